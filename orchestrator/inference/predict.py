"""Use a trained model: score it, predict. One process; in fp32, the same answers for any batch size."""

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
from orchestrator.inference.trained_model import Trained, Wanted, find_source_of, load_source, load_trained, ready
from orchestrator.recipe import Recipe, parse_recipe
from orchestrator.tasks import check_packages
from orchestrator.tasks.base import Predictions
from orchestrator.tasks.bases.padded import concatenate
from orchestrator.training.evaluation import in_order, predict_with_losses
from orchestrator.training.export import write_table
from orchestrator.training.generation import sample, score_written
from orchestrator.training.split_loader import SplitLoader

EXAMPLES_TOGETHER = 2048
ANSWERS_TOGETHER = 32


@dataclass
class Predicted:
    """What a model makes of some examples, in their order."""

    predictions: Predictions
    loss: float
    """The mean over all targets; 0 without labels."""
    targets: Predictions
    """What they are scored against; empty without labels."""


def predict_examples(
    trained: Trained, examples: Examples, batch_size: int = 64, reference: npt.NDArray[np.float64] | None = None
) -> Predicted:
    """Predict for all examples. They are encoded some at a time: pictures take far more memory than their files.

    Args:
        reference: what the source makes of them, for tasks that need it to score.
    """
    task = trained.task
    labels = [column.name for column in task.columns(task.options) if column.field.is_target]
    # A language model's targets are the texts themselves.
    has_labels = not labels or any(name in examples.table.column_names for name in labels)
    rows, parts, targets = [], [], []
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for start in range(0, len(examples), EXAMPLES_TOGETHER):
        some = examples.slice(start, min(start + EXAMPLES_TOGETHER, len(examples)))
        encoded = task.wrap(as_table(task.encode(some, trained.processor)), trained.processor)
        if reference is not None:
            encoded.reference = reference[start : start + EXAMPLES_TOGETHER]
        loader = SplitLoader(encoded, trained.device)
        # What the terms are divided by is known when all examples are encoded, so each one's sum is kept.
        names = list(encoded.counts)
        totals = [{other: 1.0 if other == name else math.inf for other in names} for name in names]
        order = np.argsort(-encoded.lengths, kind="stable")
        for mine in np.split(order, range(batch_size, len(order), batch_size)):
            predictions, losses = predict_with_losses(trained.model, task, loader, mine, totals)
            rows.append(mine + start)
            parts.append(predictions)
            sums.update(dict(zip(names, losses, strict=True)))
        counts.update({name: int(each.sum()) for name, each in encoded.counts.items()})
        if has_labels:
            targets.append(encoded.targets())
    every = {name: concatenate([part[name] for part in targets]) for name in targets[0]} if targets else {}
    loss = sum(value / max(1, counts[name]) for name, value in sums.items())
    return Predicted(in_order([(rows, parts, loss)]), loss, every)


def evaluate(
    folder: Path, data: str | None, split: str, *, overrides: Sequence[str] = (), precision: Wanted = "auto"
) -> dict[str, Any]:
    """Score a trained model on a split of its recipe's data, or of other data.

    Args:
        overrides: `target.columns.NAME=COLUMN` where the data call their columns otherwise.

    Raises:
        InputError: no such model, data or split; columns that do not fit.
    """
    trained = load_trained(folder, precision)
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
    problems = [*check_packages(type(trained.task), trained.task.options), *trained.task.check_inputs(examples)]
    if problems:
        raise DataError(problems)
    reference = compute_reference(trained, examples) if trained.task.needs_reference else None
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


def compute_reference(trained: Trained, examples: Examples) -> npt.NDArray[np.float64]:
    """What the source makes of examples; raises ModelError where it is not to be found any more."""
    task = trained.task
    source = find_source_of(trained.description)
    if hasattr(trained.model, "disable_adapter") and source.adapter is None:
        with trained.model.disable_adapter():
            asked = predict_examples(trained, examples)
    else:
        model = load_source(trained.description, task.auto_class, source, trained.as_stored)
        with models.Fp32Compute() if trained.as_stored else contextlib.nullcontext():
            task.configure_model(model, trained.processor, source)
        recipe = parse_recipe(trained.description["recipe"])
        model = ready(model, recipe, trained.precision, trained.device)
        asked = predict_examples(replace(trained, model=model), examples)
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
    folder: Path,
    data: str,
    output: Path | None,
    batch_size: int,
    out: TextIO,
    *,
    overrides: Sequence[str] = (),
    precision: Wanted = "auto",
) -> int:
    """Predict for every row of a file (or of standard input, JSON lines); returns how many.

    Each row comes back with all its columns, `prediction` and what the task adds (scores). Pictures come back as their
    paths. A model of pictures also takes a picture, or a folder of them.

    Raises:
        InputError: no such model or file; a wrong row; an output that is neither .jsonl nor .parquet.
    """
    if output is not None:
        check_output(output)
        if output.exists() and Path(data).exists() and output.samefile(data):
            raise InputError(Problem("the predictions would replace the data", str(output), "give another --output"))
    if batch_size < 1:
        raise InputError(Problem(f"batch size is {batch_size}", "--batch-size", "give 1 or more"))
    trained = load_trained(folder, precision)
    columns = trained.task.prompt_columns(trained.task.options)
    mapping = recipe_of(trained, None, overrides).target.columns
    given = open_values(Path(data), columns)
    if given is None:
        given = read_rows(data)
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
