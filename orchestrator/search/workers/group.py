"""Worker groups: a Ray Train run that the process of a trial starts, and that goes from trial to trial.

The workers stay for all trials of the process, as the process itself does for trials of one worker, so that a trial
costs the time of its computation and not that of starting its processes. The process and worker 0 exchange messages
through a channel: the *command* (which trial, how far, whether to stop) and the *status* (the last evaluation). The
other workers learn the command from worker 0 through their process group. The workers wait after each evaluation until
the scheduler has seen it, so a trial can be stopped, or continue from another, after any of them.

Ray's own way to report from within a trial is `TuneReportCallback`. It needs a Tune session, which only function
trainables have, and those start new processes for every trial; its reports pass through the Train controller, which
polls every two seconds; and the workers train on while the scheduler decides.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.search.workers.messages import Channel, ChannelClosed, Command, Status

STOP_TIMEOUT_S = 60.0  # For the workers to release what they hold.
CHECK_INTERVAL_S = 1.0
"""Longest wait for a status before checking whether the workers still run."""


class WorkerGroup:
    """The workers, as the process of a trial sees them.

    Args:
        channel: the other end is given to the workers.
        run: runs `run_trial_worker` on the workers; returns when they have exited.
        folder: holds the workers' output.
    """

    def __init__(self, channel: Channel, run: Callable[[], None], folder: Path) -> None:
        self.channel = channel
        self.folder = folder
        self.command = Command()
        self.running: Future[None] = Future()
        # A daemon: should the workers hang, this process can still end, and they with it.
        Thread(target=self._run, args=(run,), name="worker-group", daemon=True).start()

    def _run(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:  # Of any kind: it is raised again where somebody waits for the workers.
            self.running.set_exception(error)
        else:
            self.running.set_result(None)

    def start(self, id: str, parameters: dict[str, Any], seen_step: int, start_from: Path | None) -> None:
        """Let the workers train a trial.

        Args:
            seen_step: evaluations up to this step have been reported already.
            start_from: folder with the state of another trial to continue from.
        """
        number = self.command.number + 1
        self._send(Command(number, id, parameters, None if start_from is None else str(start_from), seen_step))

    def change(self, **changes: Any) -> None:
        """Change the command for the current trial."""
        self._send(replace(self.command, **changes))

    def _send(self, command: Command) -> None:
        self.command = command
        self.channel.send_command(command)

    def wait(self, is_expected: Callable[[Status], bool], timeout: float | None = None) -> Status:
        """Return the status of the current trial once it is as expected.

        Raises:
            RunFailed: the workers died more often than allowed, or did not answer within `timeout` seconds.
            ChannelClosed: the workers cannot be reached any more.
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        version = -1  # The newest status counts, even if it was read before.
        while True:
            has_ended = self.running.done()  # Checked first: a status that was sent before the end is still read below.
            seconds = 0.0 if has_ended else max(0.0, min(CHECK_INTERVAL_S, deadline - time.monotonic()))
            version, status = self.channel.next_status(version, seconds)
            if status.number == self.command.number and is_expected(status):
                return status
            if has_ended:
                self.running.result()
                raise RunFailed(f"the workers exited unexpectedly; their output is in {self.folder}")
            if time.monotonic() >= deadline:
                raise RunFailed(f"the workers did not stop within {timeout:g} s; their output is in {self.folder}")

    def shut_down(self) -> None:
        """Let the workers exit; returns when Ray Train has released their resources."""
        with contextlib.suppress(ChannelClosed):  # The workers notice that themselves.
            self.change(exit=True)
        with contextlib.suppress(OrchestratorError):  # Reported already as the failure of a trial.
            try:
                self.running.result(STOP_TIMEOUT_S)
            except TimeoutError:
                # Ray Train cannot be stopped from outside. What this process has started ends with it.
                os._exit(1)
        self.channel.close()


class WorkerGroups:
    """Keeps one worker group for the trials of a process, and starts another one where it has died.

    Args:
        start: starts a worker group.
    """

    def __init__(self, start: Callable[[], WorkerGroup]) -> None:
        self._start = start
        self._group: WorkerGroup | None = None

    def running(self) -> WorkerGroup:
        """Return the running worker group; start one where there is none."""
        if self._group is not None and self._group.running.done():
            self._group.channel.close()
            self._group = None
        if self._group is None:
            self._group = self._start()
        return self._group

    def shut_down(self) -> None:
        """End the worker group, if there is one."""
        group, self._group = self._group, None
        if group is not None:
            group.shut_down()
