"""Parameters that population-based training changes in the middle of a trial."""

from __future__ import annotations

from typing import Any

from orchestrator.json_lines import parse_object
from orchestrator.runs.directory import RunDirectory, write_json

CHANGES = "changes.json"


class Changes:
    """The parameters of a trial at each step; what changed midway is in a file in the trial's directory.

    Args:
        initial: parameters that the trial begins with.
    """

    def __init__(self, directory: RunDirectory, initial: dict[str, Any]) -> None:
        self.path = directory.root / CHANGES
        self.initial = initial
        self._found: list[dict[str, Any]] = parse_object(directory.read(CHANGES)).get("changes", [])

    def __bool__(self) -> bool:
        """Whether any parameters have changed."""
        return bool(self._found)

    @property
    def are_lost(self) -> bool:
        """Whether there were changes, but their file is damaged."""
        return not self._found and self.path.exists()

    def after(self, step: int) -> dict[str, Any]:
        """Return the parameters that the training goes on with from `step`."""
        return next((each["parameters"] for each in reversed(self._found) if each["step"] <= step), self.initial)

    def at(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters that the evaluation in `row` of metrics.jsonl was trained with."""
        return self.after(row["step"] - 1)

    def record(self, step: int, parameters: dict[str, Any]) -> None:
        """Have the trial go on with other parameters from `step`, whatever came after that before."""
        self.forget_after(step - 1)
        if self.after(step) != parameters:
            self._write([*self._found, {"step": step, "parameters": parameters}])

    def forget_after(self, step: int) -> None:
        """Drop the changes after `step`, from which the trial goes on."""
        kept = [each for each in self._found if each["step"] <= step]
        if kept != self._found:
            self._write(kept)

    def _write(self, found: list[dict[str, Any]]) -> None:
        self._found = found
        if found:
            write_json(self.path, {"changes": found})
        else:
            self.path.unlink(missing_ok=True)
