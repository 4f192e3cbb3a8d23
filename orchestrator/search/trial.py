"""One trial: a run directory that is trained evaluation by evaluation, and can be left and taken up at any of them."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import OrchestratorError
from orchestrator.search.bench import Bench
from orchestrator.search.tuning import Report
from orchestrator.training.hooks import Memory
from orchestrator.training.loop import Step
from orchestrator.training.run_directory import RunDirectory, finite, write_json
from orchestrator.training.trainer import Session, evaluations, resume

OUTCOME, BEST_WEIGHTS, MEMORY = "outcome.json", "best.safetensors", "memory.json"
SECONDS_BETWEEN_SAVES = 30.0
# What a trial's model or numbers may cause, and what therefore ends the trial but not the search.
TRIAL_ERRORS = (OrchestratorError, RuntimeError, ValueError, ArithmeticError, MemoryError, OSError)


@dataclass(frozen=True)
class Spec:
    """What is tried."""

    id: str
    parameters: dict[str, Any]
    """Dotted places of the recipe and their values."""


@dataclass
class Outcome:
    """What became of a trial; the content of outcome.json. Its scores are in metrics.jsonl."""

    status: str = "finished"
    """finished, stopped (by the scheduler or the time limit) or failed."""
    reason: str | None = None
    best_step: int | None = None
    seconds: float = 0.0
    core_seconds: float = 0.0


class Trial:
    """A trial in progress.

    Args:
        bench: the workplace of this process.
        directory: the trial's run directory; what is in it already is not done again.
    """

    def __init__(self, bench: Bench, spec: Spec, directory: RunDirectory) -> None:
        self.bench = bench
        self.spec = spec
        self.directory = directory
        self.outcome = read_outcome(directory)
        self.session: Session | None = None
        self.memory = Memory()
        self._best: dict[str, torch.Tensor] = {}
        self._stack = contextlib.ExitStack()
        self._started, self._cpu = time.monotonic(), time.process_time()
        self._saved = time.monotonic()
        self._rows = self._advance()

    def advance(self) -> Report:
        """Go on to the next evaluation. A trial that was interrupted first tells those that it had."""
        try:
            row = next(self._rows, None)
            if row is not None and not self._is_last(row):
                return Report(self._score(row), False, row)
            outcome = self._end()
        except TRIAL_ERRORS as error:
            outcome = self._end("failed", str(error) or type(error).__name__)
            row = None
        score = None if row is None or outcome.status == "failed" else self._score(row)
        return Report(score, True, row or {}, outcome.reason if outcome.status == "failed" else None)

    def stop(self) -> None:
        """Let go of everything; the weights are kept where this may be among the best."""
        self._keep_best_weights()
        self._stack.close()
        self.session = None

    def save(self, folder: Path) -> None:
        """Write what another trial can go on from."""
        if self.session is not None:
            self.session.engine.write_state(folder)
            write_json(folder / MEMORY, self.memory.to_state())

    def restore(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Go on from what another trial wrote, with other parameters."""
        if not (folder / MEMORY).exists():
            return
        self._stack.close()
        self.spec = Spec(self.spec.id, parameters)
        self.directory.create()
        self._enter()
        assert self.session is not None
        self.session.engine.read_state(folder)
        found = Memory(**json.loads((folder / MEMORY).read_text(encoding="utf-8")))
        # Its best evaluation stays one of its own, whose weights it has.
        own = self.memory
        self.memory = replace(found, best_step=own.best_step, best_score=own.best_score, best_loss=own.best_loss)
        self._rows = evaluations(self.session, self.memory, [self])

    def after_step(self, step: Step, memory: Memory) -> None:
        """The last hook of the loop: keeps the best weights in memory, and saves a checkpoint now and then."""
        assert self.session is not None
        if memory.improved:
            weights = self.session.engine.trained_weights()
            self._best = {name: value.clone() for name, value in weights.items()}
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self._checkpoint()

    def _advance(self) -> Iterator[dict[str, Any]]:
        if self.outcome is not None:
            yield from history(self.directory)
            return
        self.directory.create()
        self._enter()
        assert self.session is not None
        self.memory = resume(self.session)
        # What it took before it was interrupted counts too.
        self._started -= self.memory.seconds
        self._cpu -= self.memory.seconds
        if self.memory.best_step is not None:
            folder = self.session.store.at(self.memory.step).folder
            self._best = load_file(folder / BEST_WEIGHTS)
        yield from history(self.directory)
        yield from evaluations(self.session, self.memory, [self])

    def _enter(self) -> None:
        self.session = self._stack.enter_context(self.bench.session(self.spec.parameters, self.directory))
        self._saved = time.monotonic()

    def _is_last(self, row: dict[str, Any]) -> bool:
        if self.outcome is not None:
            return bool(row["step"] == history(self.directory)[-1]["step"])
        assert self.session is not None
        over = self.memory.stop is not None or self.memory.step >= self.session.plan.total_steps
        return over and row["step"] == self.memory.step

    def _score(self, row: dict[str, Any]) -> float:
        metric = self.bench.metric
        # Files hold null for what is no number.
        value = math.nan if row[metric.name] is None else float(row[metric.name])
        return value if metric.higher_is_better else -value

    def _end(self, status: str = "finished", reason: str | None = None) -> Outcome:
        """Write down what became of the trial, unless that has been done, and let go of what it held."""
        self.stop()
        if self.outcome is None:
            self.outcome = Outcome(
                status=status,
                reason=reason or self.memory.stop,
                best_step=self.memory.best_step,
                seconds=time.monotonic() - self._started,
                core_seconds=time.process_time() - self._cpu,
            )
            write_outcome(self.directory, self.outcome)
        return self.outcome

    def _checkpoint(self) -> None:
        """Save what the trial goes on from after an interruption."""
        session = self.session
        assert session is not None

        def write(folder: Path) -> None:
            session.engine.write_state(folder)
            save_file(self._best, folder / BEST_WEIGHTS)

        session.store.save(self.memory.step, self.memory.to_state(), write)
        session.store.prune(1, None)
        self._saved = time.monotonic()

    def _keep_best_weights(self) -> None:
        """The weights at the best evaluation go to the disk only where this may be the winner."""
        score = self.memory.best_score
        if self._best and score is not None and self.bench.may_win(score):
            temporary = self.directory.root / f".{BEST_WEIGHTS}.partial"
            save_file(self._best, temporary)
            temporary.replace(self.directory.root / BEST_WEIGHTS)
        self._best = {}


def history(directory: RunDirectory) -> list[dict[str, Any]]:
    """The evaluations on *select* so far, as rows of metrics.jsonl."""
    return [row for row in directory.read_metrics() if row.get("split") == "select"]


def read_outcome(directory: RunDirectory) -> Outcome | None:
    """What became of the trial; None while it has not ended."""
    try:
        return Outcome(**json.loads((directory.root / OUTCOME).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_outcome(directory: RunDirectory, outcome: Outcome) -> None:
    write_json(directory.root / OUTCOME, finite(vars(outcome)))
