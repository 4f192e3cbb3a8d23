"""Parameters that population-based training changes during a trial."""

from __future__ import annotations

from typing import Any

from orchestrator.json_lines import parse_object
from orchestrator.runs.directory import RunDirectory, write_json

CHANGES = "changes.json"


class Changes:
    """The parameters of a trial at each step; changes are in a file in the trial's directory.

    Args:
        initial: parameters that the trial starts with.
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
        """Return the parameters of the training from `step` on."""
        return next((each["parameters"] for each in reversed(self._found) if each["step"] <= step), self.initial)

    def at(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters that the evaluation in `row` of metrics.jsonl was trained with."""
        return self.after(row["step"] - 1)

    def record(self, step: int, parameters: dict[str, Any]) -> None:
        """Record that the trial continues from `step` with other parameters; drops changes from `step` on."""
        self.forget_after(step - 1)
        if self.after(step) != parameters:
            self._write([*self._found, {"step": step, "parameters": parameters}])

    def forget_after(self, step: int) -> None:
        """Drop the changes after `step`, from which the trial continues."""
        kept = [each for each in self._found if each["step"] <= step]
        if kept != self._found:
            self._write(kept)

    def _write(self, found: list[dict[str, Any]]) -> None:
        self._found = found
        if found:
            write_json(self.path, {"changes": found})
        else:
            self.path.unlink(missing_ok=True)
