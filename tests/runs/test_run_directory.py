"""The records of a run: whole or not there, JSON that every reader takes, one command at a time."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import InputError
from orchestrator.json_lines import finite
from orchestrator.runs.directory import RunDirectory, write_atomically, write_json

HOLD = """
import sys, time
from pathlib import Path
from orchestrator.runs.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(tmp_path / "runs" / "toy")
    found.create()
    return found


def test_others_cannot_look_into_a_run(directory: RunDirectory) -> None:
    assert stat.S_IMODE(directory.root.stat().st_mode) == 0o700


def test_a_failed_write_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"step": 1})

    def fail(_: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "half of a new")
    assert json.loads(path.read_text(encoding="utf-8")) == {"step": 1}


def test_numbers_that_json_lacks_become_null_and_are_never_written_as_they_are(tmp_path: Path) -> None:
    value: dict[str, Any] = {"loss": math.nan, "all": [1.0, math.inf, {"deep": -math.inf}], "name": "x"}
    assert finite(value) == {"loss": None, "all": [1.0, None, {"deep": None}], "name": "x"}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", value)


def test_updates_add_to_the_record_and_notes_add_up(directory: RunDirectory) -> None:
    directory.update_record(status="running", attempt=1)
    directory.add_note("first")
    directory.add_note("second")
    directory.update_record(status="finished")
    assert directory.read_record() == {"status": "finished", "attempt": 1, "notes": ["first", "second"]}


@pytest.mark.parametrize("content", ["", '{"status": "run', "[1]", "null"])
def test_a_damaged_record_reads_as_none_and_is_built_anew(directory: RunDirectory, content: str) -> None:
    directory.record.write_text(content, encoding="utf-8")
    assert directory.read_record() == {}
    assert directory.update_record(attempt=2) == {"attempt": 2}


def test_a_torn_line_of_metrics_is_passed_over_and_lost_steps_are_forgotten(directory: RunDirectory) -> None:
    assert directory.read_metrics() == []
    for step in (10, 20, 30):
        directory.append_metrics({"step": step, "loss": math.nan if step == 20 else 1.0})
    with directory.metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 40, "lo')
    assert [row["step"] for row in directory.read_metrics()] == [10, 20, 30]
    directory.forget_metrics_after(20)
    directory.append_metrics({"step": 30, "loss": 2.0})
    rows = [json.loads(line) for line in directory.metrics.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": None}, {"step": 30, "loss": 2.0}]


def test_a_second_command_is_refused_until_the_first_ends_however_it_ends(directory: RunDirectory) -> None:
    command = [sys.executable, "-c", HOLD, str(directory.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError) as refused, directory.lock():
            pass
        holder.kill()
    (problem,) = refused.value.problems
    assert problem.where == str(directory.root)
    assert problem.remedy is not None
    with directory.lock():
        assert (directory.root / ".lock").exists()


def test_set_aside_directories_take_names_that_are_free(tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        directory = RunDirectory(tmp_path / "toy")
        directory.create()
        names.append(Path(directory.set_aside()).name)
    assert names == ["toy.old-1", "toy.old-2"]
    assert not (tmp_path / "toy").exists()
