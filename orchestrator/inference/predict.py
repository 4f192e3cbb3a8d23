"""Evaluate a trained model, and predict with it, in one process. In fp32, results do not depend on the batch size."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator import models
from orchestrator.data import Examples, open_file, open_splits, open_values, rename_columns, without_bytes
from orchestrator.data.cache import as_table
from orchestrator.data.formats.readers import READERS
from orchestrator.errors import DataError, InputError, Problem
from orchestrator.inference.trained_model import (
    PrecisionChoice,
    TrainedModel,
    find_source_of,
    load_source,
    load_trained_model,
    prepare_for_inference,
)
from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.tasks import check_packages
from orchestrator.tasks.base import Predictions
from orchestrator.tasks.bases.padded import concatenate
from orchestrator.training.evaluation import in_order, predict_with_losses
from orchestrator.training.export import write_table
from orchestrator.training.generation import sample, score_written
from orchestrator.training.split_loader import SplitLoader

EXAMPLES_ENCODED_AT_ONCE = 2048
GENERATION_BATCH_SIZE = 32


@dataclass
class SplitPredictions:
    """Predictions for some examples, in their order."""

    predictions: Predictions
    loss: float
    """The mean over all targets; 0 without labels."""
    targets: Predictions
    """The true values; empty without labels."""


def predict_examples(
    trained: TrainedModel, examples: Examples, batch_size: int = 64, reference: npt.NDArray[np.float64] | None = None
) -> SplitPredictions:
    """Predict for all examples. They are encoded in parts, because pictures take far more memory than their files.

    Args:
        reference: predictions of the source, for tasks whose loss needs them; shape [num_examples, ...].
    """
    task = trained.task
    labels = [column.name for column in task.columns(task.options) if column.field.is_target]
    # A language model's targets are the texts themselves.
    has_labels = not labels or any(name in examples.table.column_names for name in labels)
    rows, parts, targets = [], [], []
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for start in range(0, len(examples), EXAMPLES_ENCODED_AT_ONCE):
        some = examples.slice(start, min(start + EXAMPLES_ENCODED_AT_ONCE, len(examples)))
        encoded = task.wrap(as_table(task.encode(some, trained.processor)), trained.processor)
        if reference is not None:
            encoded.reference = reference[start : start + EXAMPLES_ENCODED_AT_ONCE]
        loader = SplitLoader(encoded, trained.device)
        # The divisors of the loss's terms are known once all examples are encoded, so each term's sum is kept.
        names = list(encoded.counts)
        totals = [{other: 1.0 if other == name else math.inf for other in names} for name in names]
        order = np.argsort(-encoded.lengths, kind="stable")
        for batch in np.split(order, range(batch_size, len(order), batch_size)):
            predictions, losses = predict_with_losses(trained.model, task, loader, batch, totals)
            rows.append(batch + start)
            parts.append(predictions)
            sums.update(dict(zip(names, losses, strict=True)))
        counts.update({name: int(each.sum()) for name, each in encoded.counts.items()})
        if has_labels:
            targets.append(encoded.targets())
    every = {name: concatenate([part[name] for part in targets]) for name in targets[0]} if targets else {}
    loss = sum(value / max(1, counts[name]) for name, value in sums.items())
    return SplitPredictions(in_order([(rows, parts, loss)]), loss, every)


def evaluate(
    folder: Path, data: str | None, split: str, *, overrides: Sequence[str] = (), precision: PrecisionChoice = "auto"
) -> dict[str, Any]:
    """Score a trained model on a split of its recipe's data, or of other data.

    Args:
        overrides: `target.columns.NAME=COLUMN`, for data with other names of columns.

    Raises:
        InputError: the model, the data or the split does not exist; columns do not fit.
    """
    trained = load_trained_model(folder, precision)
    recipe = recipe_of(trained, data, overrides)
    if data is None:
        from orchestrator.training.prepare import read_examples

        found = read_examples(recipe, type(trained.task), trained.task.options)
    else:
        found = open_splits(recipe, trained.task.columns(trained.task.options))
        if list(found) == ["train"]:  # A single file has a single split.
            split = "train"
    if split not in found:
        raise InputError(Problem(f"the data have no split '{split}'", data, f"give --split one of: {', '.join(found)}"))
    examples = found[split]
    problems = [*check_packages(type(trained.task), trained.task.options), *trained.task.check_inputs(examples)]
    if problems:
        raise DataError(problems)
    reference = compute_reference(trained, examples) if trained.task.needs_reference else None
    scored = predict_examples(trained, examples, reference=reference)
    metrics = {"loss": scored.loss, **trained.task.metrics(scored.predictions, scored.targets)}
    if trained.task.num_written:
        some = sample(trained.task, examples)
        written = trained.task.generate(trained.model, trained.processor, some, GENERATION_BATCH_SIZE)
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


def compute_reference(trained: TrainedModel, examples: Examples) -> npt.NDArray[np.float64]:
    """Return the source's predictions for examples; raises ModelError if the source is missing."""
    task = trained.task
    source = find_source_of(trained.description)
    if hasattr(trained.model, "disable_adapter") and source.adapter is None:
        with trained.model.disable_adapter():
            predicted = predict_examples(trained, examples)
    else:
        model = load_source(trained.description, task.auto_class, source, trained.as_stored)
        with models.Fp32ComputeMode() if trained.as_stored else contextlib.nullcontext():
            task.configure_model(model, trained.processor, source)
        recipe = parse_recipe(trained.description["recipe"])
        model = prepare_for_inference(model, recipe, trained.precision, trained.device)
        predicted = predict_examples(replace(trained, model=model), examples)
    (found,) = predicted.predictions.values()
    return np.asarray(found, np.float64)


def recipe_of(trained: TrainedModel, data: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of the model, with other data or other names of columns if they are given."""
    wrong = [text for text in overrides if not text.startswith("target.columns")]
    if wrong:
        remedy = "the model is trained already; give target.columns.NAME=COLUMN, or remove it"
        raise InputError(Problem(f"{text} has no effect here", "command line", remedy) for text in wrong)
    given = list(overrides)
    if data is not None:
        value = str(Path(data).resolve()) if is_local(data) else data
        given += [f"target.data={json.dumps(value)}", "target.limit={}"]
    return parse_recipe(trained.description["recipe"], overrides=given)


def is_local(data: str) -> bool:
    """Whether data are a file or folder of this machine, by name, or a Hub id."""
    return Path(data).exists() or Path(data).suffix in READERS


def predict(
    folder: Path,
    data: str,
    output: Path | None,
    batch_size: int,
    out: TextIO,
    *,
    overrides: Sequence[str] = (),
    precision: PrecisionChoice = "auto",
) -> int:
    """Predict for every row of a file, or of standard input (JSON lines); return the number of rows.

    Each row is written with all its columns, `prediction` and further columns of the task, such as scores. Pictures are
    written as their paths. A model of pictures also takes a picture, or a folder of pictures.

    Raises:
        InputError: the model or the file does not exist; a row is wrong; the output is neither .jsonl nor .parquet.
    """
    if output is not None:
        check_output_file(output)
        if output.exists() and Path(data).exists() and output.samefile(data):
            raise InputError(Problem("the predictions would replace the data", str(output), "give another --output"))
    if batch_size < 1:
        raise InputError(Problem(f"batch size is {batch_size}", "--batch-size", "give 1 or more"))
    trained = load_trained_model(folder, precision)
    columns = trained.task.prompt_columns(trained.task.options)
    mapping = recipe_of(trained, None, overrides).target.columns
    given = open_values(Path(data), columns)
    if given is None:
        given = read_input(data)
    else:
        mapping = {}  # Values without a data file come under the task's own name.
    examples = rename_columns(given, columns, mapping)
    problems = trained.task.check_prompts(examples)
    if problems:
        raise DataError(problems)
    added = trained.task.generate(trained.model, trained.processor, examples, batch_size)
    if added is None:
        predictions = predict_examples(trained, examples, batch_size).predictions
        added = trained.task.prediction_rows(predictions, examples)
    kept = {name: without_bytes(given.table[name]) for name in given.table.column_names if name not in added}
    write_predictions(pa.table({**kept, **added}), output, out)
    return len(examples)


def write_predictions(table: pa.Table, output: Path | None, out: TextIO) -> None:
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


def check_output_file(output: Path) -> None:
    """Raise InputError for a file that cannot be written, before anything is computed."""
    if output.suffix not in (".jsonl", ".parquet"):
        kind = f"a {output.suffix} file" if output.suffix else "a file without suffix"
        raise InputError(Problem(f"cannot write {kind}", str(output), "name a .jsonl or .parquet file"))
    if not output.parent.is_dir():
        raise InputError(Problem(f"there is no folder {output.parent}", str(output), f"mkdir -p {output.parent}"))


def read_input(data: str) -> Examples:
    """Read all columns of a file, or JSON lines from standard input (`-`), a pipe or another stream."""
    path = Path(data)
    if data != "-" and not path.is_fifo() and not path.is_char_device():
        return open_file(path)
    name = "standard input" if data == "-" else data
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "stream.jsonl"
        copy.write_bytes(sys.stdin.buffer.read() if data == "-" else path.read_bytes())
        try:
            given = open_file(copy)
        except DataError as error:
            raise DataError(
                replace(item, where=str(item.where).replace(str(copy), name)) for item in error.problems
            ) from None
    # Paths in rows from a pipe are relative to the current folder.
    return replace(given, files=tuple(replace(file, place=name, folder=Path.cwd()) for file in given.files))
