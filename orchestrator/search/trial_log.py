"""The log of a search in the process of the command: the lines of trials.jsonl, and the table on the screen."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TextIO

from orchestrator.formatting import format_duration
from orchestrator.json_lines import append_json_line, read_json_lines
from orchestrator.search.changes import Changes
from orchestrator.search.outcome import Outcome, history, read_outcome, write_outcome
from orchestrator.search.records import SearchDirectory, best_first
from orchestrator.search.space import describe
from orchestrator.tasks.base import MainMetric

TABLE_INTERVAL_S = 1.0
NUM_TRIALS_SHOWN = 8
NOT_METRICS = ("step", "epoch", "phase", "split", "seconds", "parameters")


@dataclass
class Entry:
    """A trial that has not ended."""

    parameters: dict[str, Any]
    started: float | None = None
    """Time of its start; None before that."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    batched: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Parameters of the trials that are trained as one, by their ids."""


class TrialLog:
    """Writes trials.jsonl: one line for each trial that has ended.

    Args:
        num_trials: how many there will be, to estimate the time left.
        screen: where to show the table; None for nowhere.
        end_together: whether paused trials end only with the search, so that the time left cannot be estimated.
    """

    def __init__(
        self,
        directory: SearchDirectory,
        metric: MainMetric,
        num_trials: int,
        screen: TextIO | None,
        end_together: bool = False,
    ) -> None:
        self.directory = directory
        self.metric = metric
        self.num_trials = num_trials
        self.end_together = end_together
        self.running: dict[str, Entry] = {}
        self.rows = read_json_lines(directory.rows)
        self.table = None if screen is None else LiveTable(screen)
        self._known = {row["id"] for row in self.rows}
        # The table is drawn after each trial, without sorting all trials again.
        self._leaders = best_first(self.rows, metric)[:NUM_TRIALS_SHOWN]
        self._failed = sum(row["status"] == "failed" for row in self.rows)
        self._before = len(self.rows)
        self._started = time.monotonic()

    def add(self, id: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Add a trial that will start; return what its actor needs to know."""
        self.running[id] = Entry(parameters)
        return {"id": id, "parameters": parameters}

    def add_batch(self, id: str, batched: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Add several trials that are trained as one, as `add` does."""
        self.running[id] = Entry({}, batched=batched)
        return {"id": id, "parameters": {}, "batched": batched}

    def on_trial_start(self, id: str) -> None:
        self.running[id].started = self.running[id].started or time.monotonic()

    def on_trial_result(self, id: str, row: dict[str, Any]) -> None:
        entry = self.running[id]
        # A trial whose process died reports again what it had reported.
        while entry.rows and entry.rows[-1]["step"] >= row["step"]:
            entry.rows.pop()
        entry.rows.append(row)
        self._show()

    def on_trial_complete(self, id: str, is_last: bool, reason: str | None) -> None:
        entry = self.running.pop(id)
        for batched, parameters in entry.batched.items():
            self.running[batched] = Entry(parameters)
            self.on_trial_complete(batched, is_last, reason)
        if id in self._known or entry.batched:
            return
        run = self.directory.trial(id)
        outcome = read_outcome(run)
        if outcome is None:
            status = "failed" if reason else "finished" if is_last else "stopped"
            seconds = entry.rows[-1]["seconds"] if entry.rows else 0.0
            why = reason or (None if is_last else "behind the other trials, or out of time")
            outcome = Outcome(status, why, seconds=seconds, core_seconds=seconds)
            run.create()
            write_outcome(run, outcome)
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # The trial is never resumed.
        row = self.describe(id, entry, outcome)
        append_json_line(self.directory.rows, row)
        self.rows.append(row)
        self._known.add(id)
        self._leaders = best_first([*self._leaders, row], self.metric)[:NUM_TRIALS_SHOWN]
        self._failed += row["status"] == "failed"
        self._show(force=True)

    def stop_running(self) -> None:
        """Complete the trials that were running when the time limit was reached, for which Ray Tune calls nothing."""
        for id, entry in list(self.running.items()):
            if entry.rows:
                self.on_trial_complete(id, False, None)

    def describe(self, id: str, entry: Entry, outcome: Outcome) -> dict[str, Any]:
        """Return the row of trials.jsonl for a trial that has ended."""
        rows = entry.rows or self._recorded_rows(id, entry)
        best = self._best_of(rows)
        return {
            "id": id,
            "parameters": entry.parameters | (best or {}).get("parameters", {}),
            "metrics": {} if best is None else {key: value for key, value in best.items() if key not in NOT_METRICS},
            "best_step": None if best is None else best["step"],
            "seconds": outcome.seconds,
            "core_seconds": outcome.core_seconds,
            "epochs": rows[-1]["epoch"] if rows else 0.0,
            "evaluations": len(rows),
            "status": outcome.status,
            "reason": outcome.reason,
            "history": [{key: value for key, value in row.items() if key not in ("phase", "split")} for row in rows],
        }

    def _recorded_rows(self, id: str, entry: Entry) -> list[dict[str, Any]]:
        """Return the evaluations in the trial's directory, as they would have been reported."""
        run = self.directory.trial(id)
        changes, rows = Changes(run, entry.parameters), history(run)
        return [{**row, "parameters": changes.at(row)} for row in rows] if changes else rows

    def _best_of(self, rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
        best: dict[str, Any] | None = None
        for row in rows:
            value = row[self.metric.name]
            if value is None or math.isnan(value):
                continue
            better = best is None or self.metric.improves(value, best[self.metric.name])
            if better or (best is not None and value == best[self.metric.name] and _loss_of(row) < _loss_of(best)):
                best = row
        return best

    def _show(self, force: bool = False) -> None:
        if self.table is not None:
            self.table.show(self._lines, force)

    def _lines(self) -> list[str]:
        """Return the lines of the table: the progress of the search and its best trials."""
        ended = len(self.rows)
        done_now = ended - self._before
        elapsed = time.monotonic() - self._started
        left = elapsed / done_now * (self.num_trials - ended) if done_now and not self.end_together else None
        running = sum(entry.started is not None for entry in self.running.values())
        head = f"{ended}/{self.num_trials} trials ended, {running} running"
        head += f", {format_duration(elapsed)}" + (f", about {format_duration(left)} left" if left else "")
        shown = [self._line(row) for row in self._leaders]
        failed = [f"  {self._failed} failed; the reasons are in trials.jsonl"] if self._failed else []
        return [head, *shown, *failed]

    def _line(self, row: dict[str, Any]) -> str:
        score = f"{self.metric.name} {row['metrics'][self.metric.name]:.4f}"
        parts = [row["id"], score, f"{row['evaluations']} evaluations", f"{row['status']:8}"]
        return "  ".join(["", *parts, describe(row["parameters"])])


def _loss_of(row: dict[str, Any]) -> float:
    """Return the loss of an evaluation; infinity where it is NaN, which files hold as null."""
    loss = row["loss"]
    return math.inf if loss is None or math.isnan(loss) else float(loss)


class LiveTable:
    """Lines that are redrawn in a terminal; in other output a line from time to time."""

    def __init__(self, screen: TextIO) -> None:
        self.screen = screen
        self.live = screen.isatty()
        self._height = 0
        self._shown = 0.0
        self._last = ""

    def show(self, make_lines: Any, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._shown < TABLE_INTERVAL_S * (1 if self.live else 10) and not (force and self.live):
            return
        self._shown = now
        lines = make_lines()
        if not self.live:
            text = "; ".join(part.strip() for part in lines[:2])
            if text != self._last:
                self.screen.write(text + "\n")
            self._last = text
        else:
            up = f"\033[{self._height}A" if self._height else ""
            self.screen.write(up + "".join(f"\033[K{line}\n" for line in lines))
            self._height = max(self._height, len(lines))
        self.screen.flush()
