"""Use a trained model: score it, predict, copy it out. One process, fp32, the same answers for any batch size."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from orchestrator import models
from orchestrator.data import Examples, open_file, open_pictures, open_splits, rename_columns, without_bytes
from orchestrator.data.cache import as_table
from orchestrator.data.image_folders import is_picture
from orchestrator.data.readers import READERS
from orchestrator.errors import DataError, InputError, Problem, RunFailed
from orchestrator.models import SourceModel
from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.tasks import Task, find_task
from orchestrator.tasks.base import Arrays
from orchestrator.training.answers import sample, score_written
from orchestrator.training.evaluation import in_order, predict_rows
from orchestrator.training.export import DESCRIPTION, write_table
from orchestrator.training.feed import Feed
from orchestrator.training.model_card import card_of_merged

EXAMPLES_TOGETHER = 2048
ANSWERS_TOGETHER = 32
LARGEST_ERROR_OF_MERGING = 1e-4  # Of the largest output; fp32 sums in another order.


@dataclass
class Trained:
    """A model directory, loaded."""

    folder: Path
    description: dict[str, Any]
    """The content of transfer.json: task, options, columns, recipe."""
    task: Task
    model: Any
    processor: Any
    device: torch.device


@dataclass
class Predicted:
    """What a model makes of some examples, in their order."""

    predictions: Arrays
    loss: float
    """The mean over all targets; 0 without labels."""
    targets: Arrays
    """What they are scored against; empty without labels."""


def load_trained(folder: Path) -> Trained:
    """Load a model directory, or the one in a run directory; raises InputError when it is none of ours."""
    inner = folder / "model" if (folder / "model").is_dir() else folder
    try:
        description = json.loads((inner / DESCRIPTION).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        remedy = "give the directory of a finished run (runs/NAME), or its model directory (runs/NAME/model)"
        raise InputError(Problem(f"there is no trained model: {DESCRIPTION} is missing", str(folder), remedy)) from None
    task_class = find_task(description["task"])
    options = task_class.Options.model_validate(description["options"])
    model, source = load_weights(inner, description, task_class.auto_class)
    task = task_class.restore(options, model.config)
    # The processor was saved beside the weights, also beside those of an adapter.
    here = replace(source, name=str(inner), location=str(inner), revision=None, is_local=True, where=str(inner))
    processor, _ = task.load_processor(here)
    task.fit_model(model, processor, source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Trained(inner, description, task, model.to(device).eval(), processor, device)


def load_weights(
    folder: Path, description: dict[str, Any], auto_class: str, whole: bool = False
) -> tuple[Any, SourceModel]:
    """The model of a folder; an adapter is put onto its source, which is found as the recipe says.

    Args:
        whole: turn what the source's 4 bits stand for into fp32.
    """
    if not (folder / "adapter_config.json").exists():
        source = models.open_folder(folder, str(folder))
        return models.load_model(
            source, auto_class, models.load_config(source), from_scratch=False, seed=0
        ).model, source
    from peft import PeftModel

    base, source = load_source(description, auto_class)
    if whole:
        base.dequantize(torch.float32)
    return PeftModel.from_pretrained(base, folder), source


def load_source(description: dict[str, Any], auto_class: str) -> tuple[Any, SourceModel]:
    """The source of a trained model; raises ModelError where it is not to be found any more."""
    recipe = parse_recipe(description["recipe"])
    source = models.find_source(recipe)
    config = models.load_config(source, **config_changes(description))
    adapter = recipe.transfer.adapter
    return models.load_model(source, auto_class, config, False, 0, adapter.quantize if adapter else None).model, source


def config_changes(description: dict[str, Any]) -> dict[str, Any]:
    """What the task changed in the source's config; JSON made text of the labels' numbers."""
    changes = dict(description["config"])
    if "id2label" in changes:
        changes["id2label"] = {int(index): name for index, name in changes["id2label"].items()}
    return changes


def predict_examples(
    trained: Trained, examples: Examples, batch_size: int = 64, reference: npt.NDArray[np.float64] | None = None
) -> Predicted:
    """Predict for all examples. They are encoded some at a time: pictures take far more memory than their files.

    Args:
        reference: what the source makes of them, for tasks that need it to score.
    """
    task = trained.task
    labels = [column.name for column in task.columns(task.options) if column.kind == "label"]
    # A language model's targets are the texts themselves.
    has_labels = not labels or any(name in examples.table.column_names for name in labels)
    rows, parts, targets = [], [], []
    total, num_targets = 0.0, 0
    for start in range(0, len(examples), EXAMPLES_TOGETHER):
        some = examples.take(range(start, min(start + EXAMPLES_TOGETHER, len(examples))))
        encoded = task.wrap(as_table(task.encode(some, trained.processor)), trained.processor)
        if reference is not None:
            encoded.reference = reference[start : start + EXAMPLES_TOGETHER]
        feed = Feed(encoded, trained.device)
        order = np.argsort(-encoded.lengths, kind="stable")
        for mine in np.split(order, range(batch_size, len(order), batch_size)):
            predictions, loss = predict_rows(trained.model, task, feed, mine)
            rows.append(mine + start)
            parts.append(predictions)
            total += loss
        num_targets += int(encoded.num_targets.sum())
        if has_labels:
            targets.append(encoded.targets())
    every = {name: np.concatenate([part[name] for part in targets]) for name in targets[0]} if targets else {}
    return Predicted(in_order([(rows, parts, total)]), total / num_targets, every)


def evaluate(folder: Path, data: str | None, split: str, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Score a trained model on a split of its recipe's data, or of other data.

    Args:
        overrides: `target.columns.NAME=COLUMN` where the data call their columns otherwise.

    Raises:
        InputError: no such model, data or split; columns that do not fit.
    """
    trained = load_trained(folder)
    recipe = recipe_of(trained, data, overrides)
    if data is None:
        from orchestrator.training.prepare import read_examples

        found = read_examples(recipe, type(trained.task), trained.task.options)
    else:
        found = open_splits(recipe, trained.task.columns(trained.task.options))
        if list(found) == ["train"]:  # A single file is just that: there is nothing to choose.
            split = "train"
    if split not in found:
        raise InputError(
            Problem(f"the data have no split '{split}'", data, f"give --split with one of: {', '.join(found)}")
        )
    examples = found[split]
    problems = trained.task.check_inputs(examples)
    if problems:
        raise DataError(problems)
    reference = ask_source(trained, examples) if trained.task.needs_reference else None
    scored = predict_examples(trained, examples, reference=reference)
    metrics = {"loss": scored.loss, **trained.task.metrics(scored.predictions, scored.targets)}
    if trained.task.num_written:
        some = sample(trained.task, examples)
        written = trained.task.generate(trained.model, trained.processor, some, ANSWERS_TOGETHER)
        assert written is not None
        metrics |= score_written(trained.task, some, written["prediction"]).metrics
    details = trained.task.details(scored.predictions, scored.targets)
    where = data or f"{split} of {recipe.name}"
    return {
        "model": str(trained.folder),
        "data": where,
        "examples": len(examples),
        "metrics": metrics,
        "details": details,
    }


def ask_source(trained: Trained, examples: Examples) -> npt.NDArray[np.float64]:
    """What the source makes of examples; raises ModelError where it is not to be found any more."""
    task = trained.task
    if hasattr(trained.model, "disable_adapter"):
        with trained.model.disable_adapter():
            asked = predict_examples(trained, examples)
    else:
        model, source = load_source(trained.description, task.auto_class)
        task.fit_model(model, trained.processor, source)
        asked = predict_examples(replace(trained, model=model.to(trained.device).eval()), examples)
    (found,) = asked.predictions.values()
    return np.asarray(found, np.float64)


def recipe_of(trained: Trained, data: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that made the model, with other data or other names of their columns where they are given."""
    wrong = [text for text in overrides if not text.startswith("target.columns")]
    if wrong:
        remedy = "a trained model is as it is; give target.columns.NAME=COLUMN, or remove it"
        raise InputError(Problem(f"{text} changes nothing here", "command line", remedy) for text in wrong)
    given = list(overrides)
    if data is not None:
        value = str(Path(data).resolve()) if data_is_local(data) else data
        given += [f"target.data={json.dumps(value)}", "target.limit={}"]
    return parse_recipe(trained.description["recipe"], overrides=given)


def data_is_local(data: str) -> bool:
    return Path(data).exists() or Path(data).suffix in READERS


def predict(
    folder: Path, data: str, output: Path | None, batch_size: int, out: TextIO, *, overrides: Sequence[str] = ()
) -> int:
    """Predict for every row of a file (or of standard input, JSON lines); returns how many.

    Each row comes back with all its columns, `prediction` and what the task adds (scores). Pictures come back as their
    paths. A model of pictures also takes a picture, or a folder of them.

    Raises:
        InputError: no such model or file; a wrong row; an output that is neither .jsonl nor .parquet.
    """
    if output is not None:
        check_output(output)
    if batch_size < 1:
        raise InputError(Problem(f"batch size is {batch_size}", "--batch-size", "give 1 or more"))
    trained = load_trained(folder)
    columns = trained.task.prompt_columns(trained.task.options)
    mapping = recipe_of(trained, None, overrides).target.columns
    if any(column.kind == "image" for column in columns) and (Path(data).is_dir() or is_picture(Path(data))):
        given, mapping = open_pictures(Path(data)), {}
    else:
        given = read_rows(data)
    examples = rename_columns(given, columns, mapping)
    problems = trained.task.check_prompts(examples)
    if problems:
        raise DataError(problems)
    added = trained.task.generate(trained.model, trained.processor, examples, batch_size)
    if added is None:
        added = trained.task.prediction_rows(predict_examples(trained, examples, batch_size).predictions)
    kept = {name: without_bytes(given.table[name]) for name in given.table.column_names if name not in added}
    write_predicted(pa.table({**kept, **added}), output, out)
    return len(examples)


def write_predicted(table: pa.Table, output: Path | None, out: TextIO) -> None:
    if output is not None and output.suffix == ".parquet":
        write_table(table, output)
        return
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table.to_pylist())
    if output is None:
        out.writelines(lines)
        return
    temporary = output.with_name(f".{output.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    temporary.replace(output)


def check_output(output: Path) -> None:
    """Refuse a file that could not be written when the work is done."""
    if output.suffix not in (".jsonl", ".parquet"):
        kind = f"a {output.suffix} file" if output.suffix else "a file without suffix"
        raise InputError(Problem(f"cannot write {kind}", str(output), "name a .jsonl or .parquet file"))
    if not output.parent.is_dir():
        raise InputError(Problem(f"there is no folder {output.parent}", str(output), f"mkdir -p {output.parent}"))


def read_rows(data: str) -> Examples:
    """All columns of a file; JSON lines from standard input (`-`), a pipe or another stream."""
    path = Path(data)
    if data != "-" and not path.is_fifo() and not path.is_char_device():
        return open_file(path)
    name = "standard input" if data == "-" else data
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "stream.jsonl"
        kept.write_bytes(sys.stdin.buffer.read() if data == "-" else path.read_bytes())
        try:
            given = open_file(kept)
        except DataError as error:
            raise DataError(
                replace(item, where=str(item.where).replace(str(kept), name)) for item in error.problems
            ) from None
    # Whoever writes rows into a pipe names files from where they are.
    return replace(given, files=tuple(replace(file, place=name, folder=Path.cwd()) for file in given.files))


def export(folder: Path, output: Path, merge: bool) -> None:
    """Copy a trained model to a folder of its own; with `merge`, an adapter becomes part of the source's weights.

    Raises:
        InputError: the output exists, or there is no adapter to merge.
        RunFailed: the merged model would compute something else.
    """
    if output.exists():
        raise InputError(Problem("the output exists already", str(output), "name a folder that does not exist"))
    trained = load_trained(folder)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if not merge:
        shutil.copytree(trained.folder, partial)
    else:
        if not hasattr(trained.model, "merge_and_unload"):
            raise InputError(Problem("the model has no adapter to merge", str(folder), "export it without --merge"))
        merged_weights(trained).save_pretrained(partial)
        trained.processor.save_pretrained(partial)
        card = (trained.folder / "README.md").read_text(encoding="utf-8")
        (partial / "README.md").write_text(card_of_merged(card, trained.task), encoding="utf-8")
        shutil.copy(trained.folder / DESCRIPTION, partial)
    partial.rename(output)


def merged_weights(trained: Trained) -> Any:
    """The model with its adapter folded in, which is not left as it was; weights in 4 bits become whole.

    Raises:
        RunFailed: it computes something else than before.
    """
    inputs = trained.task.example_inputs(trained.processor)
    before = answer(trained.model, inputs)
    model = trained.model
    if models.quantized_layers(model):
        # peft would round the sum to 4 bits again.
        model, _ = load_weights(trained.folder, trained.description, trained.task.auto_class, whole=True)
    merged = model.merge_and_unload().eval()
    after = answer(merged, inputs)
    error = float((after - before).abs().max() / before.abs().max())
    if not error <= LARGEST_ERROR_OF_MERGING:
        raise RunFailed(
            f"with the adapter merged, the model's outputs differ by {error:.1e} of their size; nothing was written\n"
            "    -> export it without --merge, and load it with peft"
        )
    return merged


@torch.no_grad()
def answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What a model makes of one example, as numbers on the CPU."""
    logits: torch.Tensor = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits
    return logits.float().cpu()
