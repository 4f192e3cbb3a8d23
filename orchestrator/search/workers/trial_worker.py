"""One worker of a worker group: trains the trials that it is commanded to, and waits after each evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.json_lines import finite
from orchestrator.launch.dead_workers import AbortTraining
from orchestrator.launch.out_of_memory import is_out_of_memory
from orchestrator.runs.directory import RunDirectory
from orchestrator.runs.logs import log_to, redirect_output
from orchestrator.search.outcome import TRIAL_ERRORS
from orchestrator.search.records import SearchDirectory
from orchestrator.search.trial_context import trial_inputs
from orchestrator.search.workers.checkpointing import TrialCheckpoints
from orchestrator.search.workers.messages import Channel, ChannelClosed, Command, Status
from orchestrator.tasks.base import MainMetric
from orchestrator.training.hooks import TrainingState
from orchestrator.training.prepare import Prepared
from orchestrator.training.session import Session, open_session
from orchestrator.training.worker import evaluations

COMMAND_TIMEOUT_S = 60.0
"""Longest wait of worker 0 for a command before it answers the others: their collective must not time out."""
# Errors that would come again if the workers were started again.
LASTING_ERRORS = (OrchestratorError, ValueError, ArithmeticError)


def run_trial_worker(
    channel: Channel,
    root: Path,
    boundaries: Sequence[int],
    metric: MainMetric,
    num_threads: int,
    prepared: Prepared,
    device: torch.device,
) -> None:
    """Train one trial after another, until the worker may exit; called on every worker of a group.

    Args:
        channel: leads to the trial's process.
        root: folder of the search.
        boundaries: freeze boundaries of the search's trials.

    Raises:
        GiveUp: the trial's process cannot be reached any more.
    """
    torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        worker = TrialWorker(channel, SearchDirectory(root), boundaries, metric, prepared, device)
        worker.run_trials()
    except ChannelClosed as error:
        raise AbortTraining(RunFailed(str(error))) from error


class TrialWorker:
    """One worker of a worker group."""

    def __init__(
        self,
        channel: Channel,
        directory: SearchDirectory,
        boundaries: Sequence[int],
        metric: MainMetric,
        prepared: Prepared,
        device: torch.device,
    ) -> None:
        self.channel = channel
        self.directory = directory
        self.boundaries = boundaries
        self.metric = metric
        self.prepared = prepared
        self.device = device
        self.rank = dist.get_rank()
        self.status: Status = self.from_first(lambda: channel.next_status(-1, 0.0)[1])
        """The last status that was sent; at first that of the workers before these, where those died."""
        self.resumed_number = self.status.number
        """Number of the trial that the workers before these had started."""

    def from_first(self, action: Callable[[], Any]) -> Any:
        """Return, on every worker, what `action` returns on worker 0."""
        box = [action() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def run_trials(self) -> None:
        """Train the trials that are commanded, until the command is to exit."""
        done = self.resumed_number if self.status.is_over else max(0, self.resumed_number - 1)
        while True:
            command = self.next_trial(done)
            if command.exit:
                return
            run = self.directory.trial(command.id)
            with redirect_output(run.logs / f"worker-{self.rank}.log"):
                self.run_trial(command, run)
            done = command.number

    def next_trial(self, done: int) -> Command:
        """Return the command for a trial after number `done`, or the command to exit."""
        return self.wait(lambda command: command.exit or command.number > done)

    def wait(self, is_expected: Callable[[Command], bool]) -> Command:
        """Return the command once it is as expected."""

        def next_command() -> Command | None:
            deadline = time.monotonic() + COMMAND_TIMEOUT_S
            version = -1  # The newest command counts, even if it was read before.
            while (left := deadline - time.monotonic()) > 0:
                version, command = self.channel.next_command(version, left)
                if is_expected(command):
                    return command
            return None

        while True:
            command: Command | None = self.from_first(next_command)
            if command is not None:
                return command

    def report(self, **changes: Any) -> None:
        """Change the status; numbers that are not finite become None, as in files."""
        self.status = replace(self.status, **changes)
        if self.rank == 0:
            self.channel.send_status(Status(**finite(asdict(self.status))))

    def run_trial(self, command: Command, run: RunDirectory) -> None:
        """Train a trial until it is stopped."""
        is_resumed = self.resumed_number == command.number
        failure = self.from_first(lambda: self.channel.failure_of(command.number))
        if not is_resumed:
            self.status = Status(command.number)
        if failure is not None or command.stop:
            self.report(is_over=True, failure=failure)
            return
        try:
            self._train(command, run, is_resumed)
        except RunFailed as error:
            # All workers raise it at the same step.
            self.report(is_over=True, failure=str(error))
        except TRIAL_ERRORS as error:
            # The others may be waiting for this one. Ray Train notices its death and restarts all workers.
            if isinstance(error, LASTING_ERRORS) or is_out_of_memory(error):
                self.channel.record_failure(command.number, str(error) or type(error).__name__)
            raise

    def _train(self, command: Command, run: RunDirectory, is_resumed: bool) -> None:
        cpu_start = time.process_time()
        inputs = trial_inputs(self.prepared, command.parameters)
        opened = open_session(inputs, run, 0, self.device, None, self.metric, self.boundaries)
        with log_to(run.logs), opened as session:
            checkpoints = TrialCheckpoints(session, run)
            # Workers that died may not have left a checkpoint of this trial yet.
            has_own = is_resumed and self.from_first(lambda: bool(run.committed()))
            start_from = None if has_own or command.start_from is None else Path(command.start_from)
            state = checkpoints.restore(start_from)
            self._report_progress(session, state, cpu_start, resumed_step=state.step)
            for row in evaluations(session, state, [checkpoints]):
                self._report_progress(session, state, cpu_start, row=row)
                if self.status.is_last:
                    break
                command = self._wait_after(row["step"], command, checkpoints, state)
                if command.stop:
                    break
            while not command.stop:  # The state after the last evaluation may be asked for, too.
                command = self._wait_after(None, command, checkpoints, state)
            if command.keep_best:
                checkpoints.keep_best_weights()
            if not self.status.is_last:
                checkpoints.save(state)  # The trial may be resumed.
        self.report(is_over=True)

    def _wait_after(
        self, step: int | None, command: Command, checkpoints: TrialCheckpoints, state: TrainingState
    ) -> Command:
        """Return the command that follows the evaluation at `step`; handovers are written meanwhile.

        Args:
            step: None after the last evaluation.
        """
        number = command.number

        def is_news(new: Command) -> bool:
            is_handover = new.num_handovers > self.status.num_handovers
            return new.stop or new.exit or is_handover or (step is not None and new.seen_step >= step)

        while True:
            command = self.wait(is_news)
            if command.stop or command.exit or command.number != number:
                return replace(command, stop=True)
            if command.num_handovers > self.status.num_handovers:
                checkpoints.hand_over(state)
                self.report(num_handovers=command.num_handovers)
            elif step is not None:
                return command

    def _report_progress(self, session: Session, state: TrainingState, cpu_start: float, **changes: Any) -> None:
        spent = torch.tensor(time.process_time() - cpu_start, dtype=torch.float64, device=session.engine.device)
        self.report(
            step=state.step,
            is_last=session.ends_run(state),
            state=state.to_dict(),
            core_seconds=float(session.engine.sum_over_workers(spent)),
            **changes,
        )
