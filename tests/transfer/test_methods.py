"""Methods are found by their names, here or in other packages, and act where the door says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_samples import rows_of, weights_of

from orchestrator import load_recipe, train
from orchestrator.cli.main import main
from orchestrator.errors import RecipeError
from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.transfer import TrainedPart, find_method, method_names, read_methods

Write = Callable[..., Recipe]
RECIPE = "name: x\nsource: {model: some/model}\ntarget: {task: text-classification, data: x.jsonl}\n"
LISTED = [name for name in method_names() if name != "layer-rates"]
ENTROPY = '''
from orchestrator.recipe.sections import NotNegative, Section
from orchestrator.transfer import Added, Method


class EntropyOptions(Section):
    """Options of `entropy`."""

    weight: NotNegative = 0.1
    """Of the term."""


class Entropy(Method):
    """Rewards sure predictions."""

    name = "entropy"
    Options = EntropyOptions

    def loss(self, context):
        if self.options.weight == 0.0:
            return None
        logs = context.outputs.logits.log_softmax(-1)
        return self.options.weight * -(logs.exp() * logs).sum() / context.totals["targets"]
'''


@pytest.fixture
def entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a method of another package, which adds a term to the loss."""
    folder = tmp_path / "packages"
    info = folder / "entropy_method-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "entropy_method.py").write_text(ENTROPY, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entropy-method\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[orchestrator.methods]\nentropy = entropy_method:Entropy\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "entropy_method", raising=False)
    return "entropy"


def test_a_method_of_another_package_is_found_by_its_entry_point(entropy: str) -> None:
    assert entropy in method_names()
    assert find_method(entropy).name == entropy
    (method,) = read_methods(parse_recipe(f"{RECIPE}transfer: {{methods: [{{name: entropy, weight: 0.3}}]}}"))
    assert method.options.weight == 0.3


def test_everything_that_is_wrong_with_methods_is_said_at_once_with_its_line(entropy: str) -> None:
    text = f"""{RECIPE}transfer:
  methods:
    - {{name: entropi}}
    - {{name: entropy, wieght: 0.3}}
    - {{name: entropy, weight: -1}}
    - {{name: entropy}}
    - {{name: entropy}}
"""
    with pytest.raises(RecipeError) as caught:
        read_methods(parse_recipe(text))
    said = str(caught.value)
    assert "line 6 (transfer.methods.0.name): there is no method 'entropi'" in said
    assert "did you mean entropy?" in said
    assert "line 7 (transfer.methods.1.wieght): unknown key `wieght`" in said
    assert "line 8 (transfer.methods.2.weight): `transfer.methods.2.weight` is -1, must be a number at least 0" in said
    assert "the method 'entropy' is used twice" in said


def test_what_a_method_cannot_be_combined_with_is_refused_before_a_run_starts(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transfer = {"methods": [{"name": "l2-sp"}], "adapter": {"type": "lora"}}
    path, run = write_recipe(transfer=transfer), tmp_path / "run"
    for verb in ("validate", "train", "search"):
        given = [verb, str(path)] if verb == "validate" else [verb, str(path), "--output", str(run)]
        assert main(given) == 2
        assert "`l2-sp` holds weights near the source's, but `transfer.adapter`" in capsys.readouterr().err
    assert not run.exists()


def test_options_can_be_set_on_the_command_line_and_searched(entropy: str) -> None:
    space = "search: {space: {transfer.methods.0.weight: {choice: [0.1, 0.2]}}}\n"
    text = f"{RECIPE}transfer: {{methods: [{{name: entropy}}]}}\n{space}"
    recipe = parse_recipe(text, None, ["transfer.methods.0.weight=0.5"])
    assert read_methods(recipe)[0].options.weight == 0.5
    from orchestrator.search.space import Space, trial_recipe

    trials = [trial_recipe(recipe, parameters) for parameters in Space.of(recipe, 2).grid(4)]
    assert [read_methods(trial)[0].options.weight for trial in trials] == [0.1, 0.2]


def test_the_schema_of_a_methods_options_is_printed(entropy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--method", entropy]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["weight"]["description"] == "Of the term."


def test_a_term_of_the_loss_has_a_column_and_does_not_depend_on_the_cut(
    entropy: str, curve_recipe: Write, tmp_path: Path
) -> None:
    methods = {"methods": [{"name": entropy, "weight": 0.7}]}
    found = []
    for size in (8, 4, 2):
        run = train(curve_recipe(methods, f"train.micro_batch_size={size}"), tmp_path / f"run-{size}").directory
        found.append([[row[name] for row in rows_of(run)] for name in ("loss", "entropy")])
    assert found[0] == [pytest.approx(values, rel=1e-5) for values in found[1]]
    assert found[0] == [pytest.approx(values, rel=1e-5) for values in found[2]]
    assert found[0][1][0] == pytest.approx(0.7 * torch.tensor(3.0).log().item(), rel=0.05), "of three labels, at first"
    # The task's loss is the task's alone: without the term it begins as it does with it, and goes another way.
    plain = [row["loss"] for row in rows_of(train(curve_recipe({}), tmp_path / "plain").directory)]
    assert found[0][0][:2] == pytest.approx(plain[:2], rel=1e-6)  # The first step's rate is 0.
    assert found[0][0][2:] != pytest.approx(plain[2:], rel=1e-6)


def test_a_part_of_a_parameter_is_cut_out_of_other_tensors_alike() -> None:
    whole = torch.arange(12.0).view(3, 4)
    part = TrainedPart("weight", torch.zeros(5), torch.zeros(5), start=4)
    assert part.of(whole).tolist() == [4.0, 5.0, 6.0, 7.0, 8.0]
    same = TrainedPart("weight", torch.zeros(3, 4), torch.zeros(3, 4))
    assert same.of(whole) is whole


def test_methods_are_read_and_checked_without_torch() -> None:
    transfer = "{layer_decay: 0.5, methods: [" + ", ".join(f"{{name: {name}}}" for name in LISTED) + "]}"
    script = f"""
import sys
from orchestrator.recipe import parse_recipe
from orchestrator.transfer import read_methods
print(len(read_methods(parse_recipe({RECIPE + f"transfer: {transfer}"!r}))), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert done.stdout.split() == [str(len(LISTED) + 1), "False"]


def test_a_recipe_without_methods_has_none(write_recipe: Callable[..., Path]) -> None:
    assert read_methods(load_recipe(write_recipe())) == []


def test_a_search_trains_trials_with_phases_and_leaves_the_model_of_all_of_them(
    write_recipe: Callable[..., Path], tmp_path: Path, ray_cluster: None
) -> None:
    from orchestrator import search

    phases = [{"name": "all", "freeze": 0, "epochs": 1}, {"name": "head", "freeze": "all", "epochs": 1}]
    options: dict[str, Any] = {"space": {"train.learning_rate": {"choice": [1.0e-3, 2.0e-3]}}, "concurrent": 2}
    recipe = write_recipe(transfer={"phases": phases}, search=options, train={"epochs": 3})
    found = search(load_recipe(recipe), tmp_path / "search")
    result = json.loads((found.directory / "result.json").read_text())
    assert result["best_phase"] in ("all", "head")
    best = json.loads((found.directory / "trials.jsonl").read_text().splitlines()[0])
    trained = weights_of(found.directory)
    assert best and any(name.startswith("bert.encoder.layer.0.") for name in trained)
    rows = [json.loads(line) for path in (found.directory / "trials").glob("*/metrics.jsonl") for line in path.open()]
    assert {row["phase"] for row in rows} == {"all", "head"}
