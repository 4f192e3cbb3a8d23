"""The commands as a person or a script meets them: exit codes, what is printed where, overrides anywhere."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orchestrator.launch.train
from orchestrator.cli.main import main, parse
from orchestrator.errors import ClusterError, InputError, RunFailed
from orchestrator.recipe import json_schema, shipped_recipes

VERBS = [
    *("validate", "plan", "train", "search", "evaluate", "predict", "export", "report"),
    *("submit", "jobs", "status", "logs", "stop", "fetch", "recipes", "schema", "doctor"),
]
Capture = pytest.CaptureFixture[str]


def run_json(capsys: Capture, *arguments: str) -> dict[str, Any]:
    """Run a command with `--json`; its output must be one object and nothing else."""
    assert main([*arguments, "--json"]) == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 1
    found: dict[str, Any] = json.loads(output)
    return found


@pytest.mark.parametrize(
    ("label", "told"),
    [("{}.5", "some have a fraction; to predict classes, set target.options"), ("{}", "classes, since all numbers")],
)
def test_validate_says_what_numbers_as_labels_are_read_as_until_the_recipe_does(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: Capture, label: str, told: str
) -> None:
    rows = "".join(f"look at {'the old' * number} house,{label.format(number % 3)}\n" for number in range(1, 61))
    (tmp_path / "numbers.csv").write_text("text,label\n" + rows, encoding="utf-8")
    data = {"target": {"task": "text-classification", "data": str(tmp_path / "numbers.csv")}}
    recipe = str(write_recipe(**data))
    assert main(["validate", recipe]) == 0
    assert told in capsys.readouterr().out
    assert main(["validate", recipe, "target.options.problem_type=regression"]) == 0
    assert "target.options.problem_type" not in capsys.readouterr().out


def test_a_model_is_trained_scored_used_and_copied_by_five_commands(
    write_recipe: Callable[..., Path],
    small_data: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(write_recipe(train={"epochs": 1}))
    assert run_json(capsys, "validate", recipe)["examples"] == {"train": 60, "select": 30, "test": 30}
    trained = run_json(capsys, "train", recipe, "--output", "out", "train.seed=3")
    assert (trained["status"], trained["resumed"]) == ("finished", False)
    assert trained["directory"] == str(tmp_path / "out")
    assert "seed: 3" in (tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8")
    scored = run_json(capsys, "evaluate", "out")
    assert scored["metrics"] == pytest.approx(trained["metrics"]["test"], abs=1e-5)
    test = str(small_data / "test.jsonl")
    assert run_json(capsys, "predict", "out", test, "--output", "p.jsonl")["rows"] == 30
    assert main(["predict", "out", test]) == 0
    assert capsys.readouterr().out == (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    run_json(capsys, "export", "out", "copy")
    assert main(["evaluate", "copy", test]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_what_a_person_sees_after_training_names_results_and_places(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(write_recipe(train={"epochs": 1}))
    assert main(["train", recipe]) == 0
    first = capsys.readouterr().out
    for told in ("source", "trained", "frozen", "accuracy", "test", "runs/toy/model"):
        assert told in first
    assert main(["train", recipe]) == 0
    assert "resumed" in capsys.readouterr().out
    assert main(["train", recipe, "--fresh"]) == 0
    output = capsys.readouterr()
    assert "resumed" not in output.out
    assert "toy.old-1" in output.err
    assert main(["train", recipe, "train.seed=9"]) == 2
    refused = capsys.readouterr().err
    assert "train.seed: 0, now it is 9" in refused
    assert "--fresh" in refused


def test_the_progress_reaches_the_screen_and_chatter_the_logs(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = str(write_recipe())
    command = [sys.executable, "-m", "orchestrator.cli", "train", recipe, "--output", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "loading the model" in done.stderr
    assert "step " in done.stderr
    assert "Running in local mode" not in done.stderr
    assert "Running in local mode" in (tmp_path / "out" / "logs" / "command.log").read_text(encoding="utf-8")


def test_overrides_may_stand_before_and_after_options() -> None:
    options = parse(["train", "r.yaml", "a=1", "--output", "out", "b.c=2", "--fresh", "d=3"])
    assert options.overrides == ["a=1", "b.c=2", "d=3"]
    assert (options.recipe, options.output, options.fresh) == ("r.yaml", "out", True)


@pytest.mark.parametrize(
    "arguments, data, overrides",
    [
        (["predict", "m"], "-", []),
        (["predict", "m", "target.columns.text=body"], "-", ["target.columns.text=body"]),
        (
            ["predict", "m", "x.csv", "--batch-size", "3", "target.columns.text=body"],
            "x.csv",
            ["target.columns.text=body"],
        ),
        (["evaluate", "m"], None, []),
        (["evaluate", "m", "target.columns.text=body"], None, ["target.columns.text=body"]),
    ],
)
def test_data_and_overrides_are_told_apart(arguments: list[str], data: str | None, overrides: list[str]) -> None:
    options = parse(arguments)
    assert (options.data, options.overrides) == (data, overrides)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "no command is given"),
        (["tran"], "did you mean train?"),
        (["xyz"], "validate, preview, plan, train"),
        (["train"], "required: recipe"),
        (["train", "nowhere.yaml"], "orchestrator recipes"),
        (["train", "x.yaml", "--output"], "--output"),
        (["train", "x.yaml", "--outptu", "y"], "train does not know --outptu"),
        (["predict", "m", "--batch-size", "many"], "'many'"),
        (["recipes", "x"], "recipes does not know x"),
        (["schema", "--task", "text"], "text-classification"),
        (["predict", "m", "--json"], "--output FILE.jsonl"),
        (["evaluate", "nowhere"], "runs/NAME"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_a_hint(arguments: list[str], told: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" or "--json" in arguments
    assert told in output.err
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help_with_a_line_for_each_option(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: orchestrator {verb}")
    assert "--json" in text


def test_the_help_of_all_lists_every_command(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {verb}" in text for verb in VERBS)


@pytest.mark.parametrize(
    "error, code, status",
    [
        (RunFailed("worker 1 died"), 1, "error"),
        (InputError("no such thing"), 2, "error"),
        (ClusterError("too few GPUs"), 3, "error"),
        (OSError(28, "No space left on device", "/full/disk"), 1, "error"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["failed", "wrong", "cluster", "system", "interrupted"],
)
def test_exit_codes_tell_how_a_run_ended(
    error: BaseException,
    code: int,
    status: str,
    write_recipe: Callable[..., Path],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(orchestrator.launch.train, "train", fail)
    recipe = str(write_recipe())
    assert main(["train", recipe]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    assert main(["train", recipe, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["exit_code"]) == (status, code)
    assert found["problems"][0]["what"]


def test_debug_shows_the_traceback(capsys: Capture) -> None:
    assert main(["evaluate", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_recipes_and_schemas_are_listed_for_people_and_for_programs(capsys: Capture) -> None:
    names = [recipe.name for recipe in shipped_recipes()]
    assert [recipe["name"] for recipe in run_json(capsys, "recipes")["recipes"]] == names
    assert main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    options = run_json(capsys, "schema", "--task", "text-classification")
    assert options["title"] == "Options of text-classification"
    assert "title" not in options["properties"]["max_length"]


def test_doctor_names_what_is_missing(capsys: Capture) -> None:
    found = run_json(capsys, "doctor")
    assert {"torch", "ray", "cores", "memory"} <= {finding["name"] for finding in found["findings"]}
    assert found["missing"] == [finding["name"] for finding in found["findings"] if finding["remedy"]]


def test_what_libraries_print_is_no_part_of_the_json(
    write_recipe: Callable[..., Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatter(*_: Any, **__: Any) -> Any:
        print("a library's greeting")
        raise RunFailed("and its end")

    monkeypatch.setattr(orchestrator.launch.train, "train", chatter)
    assert main(["train", str(write_recipe()), "--json"]) == 1
    output = capsys.readouterr()
    assert json.loads(output.out)["status"] == "error"
    assert "a library's greeting" in output.err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    # The reading end is closed before anything is written, as by `| head` when it has seen enough.
    command = f"{sys.executable} -m orchestrator.cli schema | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_standard_input_from_a_terminal_is_announced(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["predict", "nowhere"]) == 2
    assert "end with Ctrl-D" in capsys.readouterr().err
