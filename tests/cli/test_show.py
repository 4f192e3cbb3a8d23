"""What a person sees: aligned tables, problems with their remedies, nothing that a terminal would obey."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from orchestrator.cli import show
from orchestrator.cli.doctor import Finding
from orchestrator.errors import Problem
from orchestrator.runs.progress import ProgressFile, ProgressLine, describe, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_columns_are_aligned_and_the_last_runs_free() -> None:
    out = io.StringIO()
    show.table([("a", "long", "x"), ("longer", "b", "y z")], out)
    assert out.getvalue() == "a       long  x\nlonger  b     y z\n"


def test_an_empty_table_prints_nothing() -> None:
    out = io.StringIO()
    show.table([], out)
    assert out.getvalue() == ""


def test_problems_say_how_grave_they_are_where_and_what_to_do() -> None:
    out = io.StringIO()
    problem = Problem("it is 0", "recipe.yaml:3", "make it 1")
    show.problems([problem, Problem("it is odd", fatal=False)], out)
    assert out.getvalue() == "error: recipe.yaml:3: it is 0\n    -> make it 1\nwarning: it is odd\n"


@pytest.mark.parametrize("text", ["\x1b[2J", "a\rb", "a\x07", "a\u202eb", "a\x9bb"])
def test_terminal_escapes_from_data_are_not_printed(text: str) -> None:
    out = io.StringIO()
    show.problems([Problem(text)], out)
    show.table([(text, text)], out)
    assert all(character.isprintable() or character == "\n" for character in out.getvalue())


def test_text_in_any_language_is_printed_as_it_is() -> None:
    assert show.clean("größer\n日本語 עברית") == "größer\n日本語 עברית"


def test_paths_below_here_are_shown_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert show.show_path(tmp_path / "runs" / "x") == "runs/x"
    assert show.show_path(Path("/elsewhere")) == "/elsewhere"


def test_scores_stand_beside_those_before_the_first_step() -> None:
    result = {
        "metrics_shown": ["nll"],
        "metrics": {"select": {"nll": 2.5, "loss": 2.5}, "test": {"nll": 2.0, "loss": 2.0}},
        "before": {"select": {"nll": 4.5, "loss": 4.5}, "test": {"nll": 4.0, "loss": 4.0}},
    }
    rows = show.scores_of(result)
    assert rows[-1] == ("test before", "nll 4.0000  loss 4.0000")
    assert rows[:2] == show.scores_of({**result, "before": None})


def test_findings_show_the_remedy_below() -> None:
    out = io.StringIO()
    show.findings([Finding("ray", "2.60.0"), Finding("torch", "missing", "pip install torch")], out)
    assert out.getvalue() == "ray    2.60.0\ntorch  missing\n    -> pip install torch\n"


def test_the_live_line_holds_what_is_known() -> None:
    assert describe({"phase": "loading"}) == "loading"
    state = {"phase": "tune", "step": 3, "steps": 9, "loss": 0.5, "metric": "accuracy", "score": 0.75}
    line = describe({**state, "examples_per_second": 99.6, "seconds_left": 61})
    assert line == "tune  step 3/9  loss 0.5000  select accuracy 0.7500  100 examples/s  1 min 1 s left"


def test_a_terminal_gets_one_line_rewritten_and_a_file_plain_lines(tmp_path: Path) -> None:
    for out, expected in ((Terminal(), "\r\033[Kone\r\033[Ktwo\r\033[K"), (io.StringIO(), "one\ntwo\n")):
        line = ProgressLine(tmp_path, out)
        line.refresh()
        for phase in ("one", "one", "two"):
            ProgressFile(tmp_path).show(force=True, phase=phase)
            line.refresh()
        line.clear()
        assert out.getvalue() == expected
        (tmp_path / ".progress.json").unlink()


def test_progress_is_shown_while_the_run_goes_on_and_its_file_removed(tmp_path: Path) -> None:
    out = io.StringIO()
    with show_progress(tmp_path, out):
        ProgressFile(tmp_path).show(force=True, phase="tune", step=1, steps=2)
        while not out.getvalue():
            pass
    assert out.getvalue() == "tune  step 1/2\n"
    assert list(tmp_path.iterdir()) == []


def test_progress_is_written_a_few_times_a_second_at_most(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path)
    progress.show(phase="one")
    progress.show(phase="two")
    assert "one" in progress.path.read_text(encoding="utf-8")
    progress.show(force=True, phase="three")
    assert "three" in progress.path.read_text(encoding="utf-8")
