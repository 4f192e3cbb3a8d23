"""The contract of tasks: what holds for every task that is found, on the sample in tests/tasks/samples of its name.

A new task is tested by adding its sample.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from task_sample import Sample
from torch.profiler import ProfilerActivity, profile

import orchestrator.tasks
from orchestrator import load_recipe, train
from orchestrator.data import Column, Examples
from orchestrator.data.cache import as_table
from orchestrator.errors import InputError, RecipeError
from orchestrator.inference.predict import evaluate, predict_examples
from orchestrator.inference.trained_model import load_trained_model
from orchestrator.planning.plan import plan
from orchestrator.planning.simulation import fake_weights, simulate
from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.recipe.reference import section_schema
from orchestrator.recipe.schema import Section
from orchestrator.tasks import Task, find_task, read_options, task_names
from orchestrator.tasks.base import Batch
from orchestrator.tasks.bases.padded import as_arrays
from orchestrator.tasks.image_classification import ImageClassification
from orchestrator.training.assembling import assemble
from orchestrator.training.prepare import Prepared, prepare, read_examples
from orchestrator.training.preview import preview

SAMPLES = Path(__file__).parent / "samples"
RECIPE = "name: x\nsource: {{model: some/model}}\ntarget:\n  task: {task}\n  data: x.jsonl\n  options: {{{options}}}\n"
LORA = "transfer.adapter={type: lora, r: 2}"
GLOBAL_BATCH = 8


def test_every_file_of_the_package_is_a_task_and_has_a_sample() -> None:
    files = {path.stem.replace("_", "-") for path in Path(orchestrator.tasks.__file__).parent.glob("*.py")}
    files -= {"--init--", "base"}
    assert set(task_names()) >= files  # Other packages may be installed that add theirs as entry points.
    assert files == {path.stem.replace("_", "-") for path in SAMPLES.glob("*.py")}


def test_tasks_say_everything_that_a_task_must() -> None:
    for name in task_names():
        task = find_task(name)
        assert issubclass(task, Task) and task.name == name and not inspect.isabstract(task) and task.__doc__
        assert hasattr(transformers, task.auto_class) and hasattr(transformers, task.processor_class)
        assert issubclass(task.Options, Section)
        options = task.Options()
        assert all(field["description"] for field in section_schema(task.Options, name)["properties"].values())
        columns = task.columns(options)
        assert all(isinstance(column, Column) for column in columns)
        names = [known for column in columns for known in (column.name, *column.aliases)]
        assert len(names) == len(set(names)) > 0


def test_wrong_options_are_refused_at_their_line() -> None:
    for name in task_names():
        task, options = read_options(parse_recipe(RECIPE.format(task=name, options="")))
        assert (task, options) == (find_task(name), task.Options())
        with pytest.raises(RecipeError) as refused:
            read_options(parse_recipe(RECIPE.format(task=name, options="no_such_option: 1")))
        (problem,) = refused.value.problems
        assert "no_such_option" in problem.what
        assert problem.where == "line 6 (target.options.no_such_option)"


def test_a_misspelt_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError) as refused:
        find_task("text-clasification", "recipe.yaml:5")
    (problem,) = refused.value.problems
    assert problem.where == "recipe.yaml:5"
    assert "did you mean text-classification?" in str(problem.remedy)


class NewHead(ImageClassification):
    """A task of another package, which draws its output layer in any case."""

    name = "new-head"
    head = "new"


def test_other_packages_add_tasks_as_entry_points(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = Runs(ImageClassification.name, tmp_path, load_sample(ImageClassification.name, tmp_path, request))
    added = EntryPoint("new-head", f"{__name__}:NewHead", orchestrator.tasks.ENTRY_POINTS)
    monkeypatch.setattr(EntryPoint, "load", lambda self: NewHead)
    monkeypatch.setattr(orchestrator.tasks, "entry_points", lambda **given: EntryPoints([added]).select(**given))
    assert "new-head" in task_names()
    trained = runs.run("plain") / "model"
    weight = "classifier.weight"
    for name, is_kept in ((ImageClassification.name, True), (NewHead.name, False)):
        prepared = prepare(runs.recipe(f"target.task={name}", f"source.model={trained}"))
        parts = assemble(prepared)
        kept = torch.equal(parts.module.get_parameter(weight), load_file(trained / "model.safetensors")[weight])
        assert (kept, weight in parts.new_parameters) == (is_kept, not is_kept)


@dataclass
class Runs:
    """The sample of a task, and short trainings on it, each done once. Nothing is drawn at random in a pass."""

    name: str
    folder: Path
    sample: Sample

    @cached_property
    def source(self) -> Path:
        """The sample's model without dropout, whose draws would differ with how a batch is cut."""
        copied = shutil.copytree(self.sample.model, self.folder / "source")
        config = json.loads((copied / "config.json").read_text())
        rates = {key: 0.0 for key, value in config.items() if "drop" in key and isinstance(value, float)}
        (copied / "config.json").write_text(json.dumps({**config, **rates}))
        return copied

    def recipe(self, *overrides: str) -> Recipe:
        target = {"task": self.name, "data": str(self.sample.data), "options": dict(self.sample.options)}
        steps = {"steps": 4, "evaluate_every": 2, "save_every": 2, "keep": 9, "log_every": 1}
        recipe = {
            "name": "contract",
            "source": {"model": str(self.source)},
            "target": target,
            "transfer": {"head": {"dropout": 0.0}},
            "train": {**steps, "learning_rate": 1e-2, "global_batch_size": GLOBAL_BATCH, "precision": "fp32"},
        }
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return load_recipe(path, overrides)

    def run(self, name: str, *overrides: str) -> Path:
        """Return the directory of the training of this name, which is made when it is first asked for."""
        directory = self.folder / name
        if not (directory / "result.json").exists():
            train(self.recipe(*overrides), directory)
        return directory

    @property
    def frozen(self) -> tuple[str, ...]:
        return (f"transfer.freeze={self.sample.freeze}", "train.cache_prefix=false")


def load_sample(name: str, folder: Path, request: pytest.FixtureRequest) -> Sample:
    spec = importlib.util.spec_from_file_location(f"sample_of_{name}", SAMPLES / f"{name.replace('-', '_')}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sample: Sample = module.make(folder, request.getfixturevalue)
    return sample


def in_groups(names: list[str]) -> list[Any]:
    """Return parameters that let workers of pytest-xdist share the tasks."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"contract of {name}")) for name in names]


SAMPLED = [path.stem.replace("_", "-") for path in sorted(SAMPLES.glob("*.py"))]


@pytest.fixture(scope="module", params=in_groups(SAMPLED))
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp(request.param)
    yield Runs(request.param, folder, load_sample(request.param, folder, request))


def rows_of(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def result_of(directory: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return result


def check_same_losses(found: Path, expected: Path, tolerance: float) -> None:
    pairs = list(zip(rows_of(found), rows_of(expected), strict=True))
    assert len(pairs) >= 6
    for row, other in pairs:
        assert (row["step"], row["split"]) == (other["step"], other["split"])
        assert row["loss"] == pytest.approx(other["loss"], rel=tolerance)


def batch_of(prepared: Prepared, rows: Any, split: str = "train") -> Batch:
    """Return rows as tensors; where the task needs the source's predictions, made-up ones."""
    encoded = prepared.encoded(split)
    if prepared.task.needs_reference:
        encoded.reference = np.random.default_rng(0).normal(size=(len(encoded), encoded.rows_per_example))
    batch = encoded.batch(np.asarray(rows))
    inputs, targets = ({name: torch.from_numpy(each) for name, each in part.items()} for part in vars(batch).values())
    return Batch(inputs, targets)


def test_bad_data_are_refused_before_anything_starts(runs: Runs) -> None:
    assert runs.sample.bad
    for data, words in runs.sample.bad:
        with pytest.raises(InputError) as refused:
            prepare(runs.recipe(f"target.data={data}"))
        assert words in str(refused.value)
        assert str(data.name) in str(refused.value)


def test_loss_and_gradient_of_a_global_batch_do_not_depend_on_how_it_is_cut(runs: Runs) -> None:
    prepared = prepare(runs.recipe())
    module = assemble(prepared).module.eval()
    totals = prepared.encoded("train").totals(np.arange(GLOBAL_BATCH))
    found = {}
    for cut in ([8], [4, 4], [2] * 4, [5, 3], [1, 6, 1]):
        module.zero_grad()
        loss = 0.0
        for rows in np.split(np.arange(GLOBAL_BATCH), np.cumsum(cut)[:-1]):
            batch = batch_of(prepared, rows)
            share = prepared.task.loss(module(**batch.inputs), batch, totals)
            share.backward()
            loss += float(share.detach())
        gradients = [value.grad for value in module.parameters() if value.grad is not None]
        found[tuple(cut)] = (loss, torch.cat([gradient.flatten() for gradient in gradients]))
    loss, gradient = found[(8,)]
    assert float(gradient.norm()) > 0
    for other, others in found.values():
        assert other == pytest.approx(loss, rel=2e-6)
        torch.testing.assert_close(others, gradient, rtol=1e-4, atol=1e-6)


def test_accumulated_passes_have_the_losses_of_whole_ones(runs: Runs) -> None:
    whole = runs.run("whole", *runs.frozen)
    check_same_losses(runs.run("accumulated", *runs.frozen, "train.micro_batch_size=2"), whole, 1e-5)


@pytest.mark.slow
def test_two_workers_have_the_losses_of_one(runs: Runs, ray_cluster: None) -> None:
    two = runs.run("two", *runs.frozen, "scale.workers=2", "train.micro_batch_size=2")
    check_same_losses(two, runs.run("whole", *runs.frozen), 1e-5)


def test_stored_features_give_the_losses_of_computed_ones(runs: Runs) -> None:
    cached = runs.run("cached", *runs.frozen, "train.cache_prefix=true")
    check_same_losses(cached, runs.run("whole", *runs.frozen), 1e-6)


def test_a_run_that_is_resumed_goes_on_as_if_nothing_had_happened(runs: Runs) -> None:
    whole = runs.run("whole", *runs.frozen)
    shutil.copytree(whole, runs.folder / "resumed")
    (runs.folder / "resumed/result.json").unlink()
    shutil.rmtree(runs.folder / "resumed/checkpoints/step-00000004")
    resumed = runs.run("resumed", *runs.frozen)
    assert rows_of(resumed) == rows_of(whole)
    assert result_of(resumed)["metrics"] == result_of(whole)["metrics"]
    written, expected = (load_file(folder / "model/model.safetensors") for folder in (resumed, whole))
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_frozen_blocks_are_bit_identical_after_training_and_others_are_not(runs: Runs) -> None:
    folders = (runs.source, runs.run("whole", *runs.frozen) / "model")
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    parameters = assemble(prepare(runs.recipe(*runs.frozen))).module.named_parameters()
    frozen = {name for name, value in parameters if not value.requires_grad} & before.keys() & after.keys()
    assert len(frozen) >= 3
    assert not [name for name in frozen if not torch.equal(before[name], after[name])]
    trained = after.keys() - frozen
    assert any(name not in before or not torch.equal(before[name], after[name]) for name in trained)


def test_adapters_random_weights_and_all_blocks_tuned_end_with_a_model_that_scores_the_same(runs: Runs) -> None:
    ways = {"plain": [], "lora": [LORA], "scratch": ["transfer.from_scratch=true"]}
    for name, overrides in ways.items():
        directory = runs.run(name, *overrides)
        found = evaluate(directory, None, "test")["metrics"]
        assert found == pytest.approx(result_of(directory)["metrics"]["test"], rel=1e-4, abs=1e-6)


def test_predictions_without_targets_are_those_that_are_scored_and_depend_on_no_batch_size(runs: Runs) -> None:
    directory = runs.run("whole", *runs.frozen)
    scored = evaluate(directory, None, "test")["metrics"]
    assert scored == pytest.approx(result_of(directory)["metrics"]["test"], rel=1e-4, abs=1e-6)
    trained = load_trained_model(directory)
    examples = split_to_test(runs, trained.task)
    targets = [column.name for column in trained.task.columns(trained.task.options) if column.field.is_target]
    without = Examples(examples.table.drop_columns(targets), examples.rows, examples.files)
    assert not trained.task.check_inputs(without)
    expected = predict_examples(trained, examples, 64).predictions
    for batch_size in (1, 3):
        check_same(predict_examples(trained, without, batch_size).predictions, expected)
    rows = trained.task.prediction_rows(expected, examples)
    assert rows and all(len(values) == len(examples) for values in rows.values())


def split_to_test(runs: Runs, task: Task) -> Examples:
    return read_examples(runs.recipe(), type(task), task.options)["test"]


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert len(found[name]) == len(values)
        for one, other in zip(found[name], values, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_the_exported_folder_predicts_the_same_without_this_package(runs: Runs) -> None:
    model = runs.run("whole", *runs.frozen) / "model"
    trained = load_trained_model(model)
    examples = split_to_test(runs, trained.task)
    plain = getattr(transformers, trained.task.auto_class).from_pretrained(model).eval()
    encoded = trained.task.wrap(as_table(trained.task.encode(examples, trained.processor)), trained.processor)
    rows = np.arange(len(examples))
    inputs, targets = (
        {name: torch.from_numpy(each) for name, each in part.items()} for part in vars(encoded.batch(rows)).values()
    )
    with torch.no_grad():
        outputs = runs.sample.run_plain(plain, dict(inputs))
    found = as_arrays(trained.task.predict(outputs, Batch(inputs, targets)))
    check_same(found, predict_examples(trained, examples).predictions)


def test_a_plan_has_the_sizes_and_the_memory_of_the_run(runs: Runs) -> None:
    recipe = runs.recipe(*runs.frozen)
    record = json.loads((runs.run("whole", *runs.frozen) / "run.json").read_text())
    found = plan(recipe)
    assert {"total": found.total, "trained": found.trained} == record["parameters"]
    assert found.steps == record["total_steps"]
    prepared = prepare(recipe)
    parts = assemble(prepared)
    parts.frozen.set_train_mode(parts.module)
    encoded = prepared.encoded("train")
    rows = np.argsort(-encoded.lengths, kind="stable")[:GLOBAL_BATCH]
    batch, totals = batch_of(prepared, rows), encoded.totals(rows)
    arrays = Batch(*({name: each.numpy() for name, each in part.items()} for part in vars(batch).values()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepared.task.loss(parts.module(**batch.inputs), batch, totals).backward()
    held, most = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    with fake_weights(parts.module):
        planned = simulate(parts, prepared.task, arrays, totals, autocast=False)
    assert 0.97 * most < planned.with_gradients < 1.5 * most


def test_preview_and_report_show_what_is_learned_and_how_well(runs: Runs) -> None:
    found = preview(runs.recipe(), count=1)
    text = "".join(piece for piece, _ in found.examples[0].segments)
    assert runs.sample.shown in text
    assert any(is_learned for _, is_learned in found.examples[0].segments)
    directory = runs.run("whole", *runs.frozen)
    page = (directory / "report.html").read_text(encoding="utf-8")
    task = found.prepared.task
    assert task.main_metric.name in task.metrics_shown
    assert all(name in page for name in task.metrics_shown)
    assert set(result_of(directory)["metrics"]["test"]) <= set(task.metric_directions())
