"""What holds for every method, found as the program finds them, on the sample that its own test module has."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_samples import MethodSample, rows_of, weights_of

import orchestrator.transfer
from orchestrator import train
from orchestrator.errors import RecipeError
from orchestrator.planning.plan import plan
from orchestrator.recipe import Recipe
from orchestrator.recipe.reference import section_schema
from orchestrator.recipe.sections import Section
from orchestrator.training.hooks import Saver
from orchestrator.transfer import Method, find_method, method_names, read_methods

Write = Callable[..., Recipe]
every_method = pytest.mark.parametrize("name", method_names())


def sample_of(name: str) -> MethodSample:
    sample: MethodSample = importlib.import_module(f"test_{name.replace('-', '_')}").SAMPLE
    return sample


@pytest.fixture(scope="module")
def runs() -> dict[str, Path]:
    """Runs of the samples, by their methods."""
    return {}


@pytest.fixture
def run_of(
    runs: dict[str, Path], curve_recipe: Write, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The run of a method's sample on one worker, one pass a step."""

    def run(name: str) -> Path:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name) / "run"
            runs[name] = train(curve_recipe(sample_of(name).transfer), folder).directory
        return runs[name]

    return run


def check_same_curve(one: Path, other: Path, terms: tuple[str, ...], tolerance: float = 1e-5) -> None:
    for split, names in (("train", ("loss", *terms)), ("select", ("loss",)), ("test", ("loss",))):
        first, second = rows_of(one, split), rows_of(other, split)
        assert [row["step"] for row in first] == [row["step"] for row in second]
        for name in names:
            assert [row[name] for row in second] == pytest.approx([row[name] for row in first], rel=tolerance), name


def test_every_file_of_the_package_is_a_method() -> None:
    files = {path.stem.replace("_", "-") for path in Path(orchestrator.transfer.__file__).parent.glob("*.py")}
    assert set(method_names()) == files - {"--init--", "base"}


def test_methods_have_their_files_names_a_description_and_options_with_defaults() -> None:
    for name in method_names():
        method = find_method(name)
        assert issubclass(method, Method) and method.name == name and method.__doc__
        assert issubclass(method.Options, Section)
        method.Options()
        for option in section_schema(method.Options, name)["properties"].values():
            assert option["description"], name


@every_method
def test_a_run_has_the_methods_columns_and_steps(name: str, run_of: Callable[[str], Path]) -> None:
    sample, rows = sample_of(name), rows_of(run_of(name))
    assert [row["step"] for row in rows] == list(range(1, sample.steps + 1))
    usual = {"step", "epoch", "phase", "split", "loss", "gradient_norm", "learning_rate"}
    assert all(set(row) == usual | set(sample.terms) for row in rows)


@every_method
@pytest.mark.parametrize("size", [4, 2])
def test_it_does_not_matter_how_a_batch_is_accumulated(
    name: str, size: int, run_of: Callable[[str], Path], curve_recipe: Write, tmp_path: Path
) -> None:
    sample = sample_of(name)
    other = train(curve_recipe(sample.transfer, f"train.micro_batch_size={size}"), tmp_path / "run").directory
    check_same_curve(run_of(name), other, sample.terms)


@every_method
def test_two_workers_have_the_curve_of_one(
    name: str, run_of: Callable[[str], Path], curve_recipe: Write, tmp_path: Path, ray_cluster: None
) -> None:
    sample = sample_of(name)
    other = train(curve_recipe(sample.transfer, "scale.workers=2"), tmp_path / "run").directory
    check_same_curve(run_of(name), other, sample.terms)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("workers", [1, 2])
def test_deepspeed_has_the_same_curve(
    name: str,
    stage: int,
    workers: int,
    run_of: Callable[[str], Path],
    curve_recipe: Write,
    tmp_path: Path,
    ray_cluster: None,
) -> None:
    sample = sample_of(name)
    scale = ["scale.engine=deepspeed", f"scale.zero_stage={stage}", f"scale.workers={workers}"]
    other = train(curve_recipe(sample.transfer, *scale), tmp_path / "run").directory
    check_same_curve(run_of(name), other, sample.terms, tolerance=1e-4)


@every_method
def test_a_run_goes_on_exactly_after_any_step(
    name: str, run_of: Callable[[str], Path], curve_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sample_of(name)
    recipe = curve_recipe(sample.transfer, "train.save_every=1", "train.keep=1")
    save = Saver.after_step

    def save_then_die(self: Saver, step: Any, state: Any) -> None:
        save(self, step, state)
        if step.number in dying:
            dying.remove(step.number)
            raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "after_step", save_then_die)
    dying = {2, sample.steps // 2 + 1, sample.steps - 1}
    for _ in range(len(dying)):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run")
    directory = train(recipe, tmp_path / "run").directory
    for split in ("train", "select"):
        assert rows_of(directory, split) == rows_of(run_of(name), split)
    whole, again = weights_of(run_of(name)), weights_of(directory)
    assert all(np.array_equal(whole[key], again[key]) for key in whole)


@every_method
def test_weight_0_equals_none_to_the_bit(name: str, curve_recipe: Write, tmp_path: Path) -> None:
    off, terms = sample_of(name).off, sample_of(name).terms
    if off is None:
        pytest.skip("it has no weight")
    found = [
        train(curve_recipe(transfer), tmp_path / f"run-{number}").directory for number, transfer in enumerate((off, {}))
    ]
    without = [[{key: row[key] for key in row if key not in terms} for row in rows_of(run)] for run in found]
    assert without[0] == without[1] and without[0]
    first, second = map(weights_of, found)
    assert all(np.array_equal(first[key], second[key]) for key in second)


@every_method
def test_frozen_blocks_are_bit_identical_after_training(
    name: str, curve_recipe: Write, still_bert: Path, tmp_path: Path
) -> None:
    sample = sample_of(name)
    run = train(curve_recipe({**sample.transfer, **sample.frozen}), tmp_path / "run").directory
    before, after = weights_of_source(still_bert), weights_of(run)
    frozen = [key for key in after if key.startswith(("bert.embeddings.", "bert.encoder.layer.0."))]
    assert len(frozen) == 5 + 16
    assert all(np.array_equal(before[key], after[key]) for key in frozen)
    result = json.loads((run / "result.json").read_text())
    trained = [key for key in after if key.startswith("bert.encoder.layer.1.")]
    assert result["best_phase"] != "tune" or any(not np.array_equal(before[key], after[key]) for key in trained)


def weights_of_source(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(folder / "model.safetensors"))


@every_method
def test_a_plan_counts_what_it_adds(name: str, curve_recipe: Write) -> None:
    sample = sample_of(name)
    recipe = curve_recipe(sample.transfer)
    found = plan(recipe)
    assert found.steps == sample.steps
    added = sum(method.plan().bytes_per_number for method in read_methods(recipe))
    assert found.chosen.memory.parts.get("methods", 0) == pytest.approx(added * found.trained, abs=1)


def test_methods_compose_or_refuse_each_other_by_name(curve_recipe: Write) -> None:
    for one, other in itertools.combinations(method_names(), 2):
        first, second = sample_of(one).transfer, sample_of(other).transfer
        methods = [*first.get("methods", []), *second.get("methods", [])]
        try:
            found = read_methods(curve_recipe({**first, **second, "methods": methods}))
        except RecipeError as error:
            assert one in str(error) and other in str(error)
        else:
            assert {one, other} <= {method.name for method in found}
