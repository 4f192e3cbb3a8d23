"""Prepare a run before a worker starts: find the source; read, check, split and encode the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa

from orchestrator import models
from orchestrator.data import cache, checks, splits
from orchestrator.data.examples import Examples
from orchestrator.data.fields.columns import Column
from orchestrator.data.mixing import apply_weights
from orchestrator.data.sources import open_splits
from orchestrator.data.streaming import num_streamed
from orchestrator.errors import InputError, Problem, raise_if_fatal
from orchestrator.models import SourceModel
from orchestrator.models.folder import MERGE
from orchestrator.recipe import Recipe
from orchestrator.recipe.schema import Data
from orchestrator.tasks import Encoded, Task, check_packages, read_options
from orchestrator.transfer import read_methods

T = TypeVar("T")
ENCODING_VERSION = 3


@dataclass(frozen=True)
class Inputs:
    """The source model's files and the examples that a recipe names. Nothing is loaded yet."""

    recipe: Recipe
    source: SourceModel
    task: type[Task]
    options: Any
    """The task's options."""
    examples: dict[str, Examples]
    warnings: list[Problem]


@dataclass(frozen=True)
class Prepared:
    """A recipe with its source found and its data encoded. It can be sent to workers."""

    recipe: Recipe
    source: SourceModel
    task: Task
    processor: Any
    examples: dict[str, Examples]
    """Without what takes much memory: the paths of pictures, not the pictures."""
    tables: dict[str, pa.Table]
    """Encoded splits, by name."""
    keys: dict[str, str]
    """A hash of what each encoded split is made from."""
    identity: dict[str, str]
    """Fingerprints of the source and of each split: a run is only ever resumed on the same ones."""
    warnings: list[Problem]
    parameters: dict[str, int] | None = None
    """Numbers of parameters, `total` and `trained`; None where they are not counted, or only the weights show them."""
    tokens_per_pass: int | None = None
    """The largest micro batch, padding counted, in the unit of the examples' lengths; None for no limit."""

    def encoded(self, split: str) -> Encoded:
        return self.task.wrap(self.tables[split], self.processor)


def read_inputs(recipe: Recipe, strict: bool = False) -> Inputs:
    """Find the source, read and check the data.

    Raises:
        InputError: everything that is wrong with them, in one report.
    """
    problems: list[Problem] = []
    source = _collect(problems, lambda: models.find_source(recipe))
    chosen = _collect(problems, lambda: read_options(recipe))
    _collect(problems, lambda: read_methods(recipe))
    if chosen is not None:
        problems += check_packages(*chosen, recipe.origin.where("target.options"))
        problems += check_source(source, chosen[0]) if source is not None else []
    examples = _collect(problems, lambda: read_examples(recipe, *chosen)) if chosen else None
    if examples is not None and chosen is not None:
        problems += chosen[0].check(chosen[1], examples, recipe)
        problems += checks.check_sizes(examples, recipe.train.global_batch_size, recipe.origin)
        problems += check_stream(examples["train"], recipe)
    if source is None or chosen is None or examples is None:
        raise InputError(problems)
    return Inputs(recipe, source, *chosen, examples, raise_if_fatal(problems, InputError, strict))


def check_source(source: SourceModel, task: type[Task]) -> list[Problem]:
    """Return a problem where the source is an adapter that the task cannot tune: a head of its own would not fit."""
    if source.adapter is None or task.tunes_adapters:
        return []
    what = f"{source.name!r} is an adapter, and only language models go on from one"
    return [Problem(what, source.where, MERGE)]


def encode_inputs(inputs: Inputs, strict: bool = False) -> Prepared:
    """Encode the examples (or take them from the cache) with the source's processor.

    Raises:
        InputError: what does not fit the source model.
    """
    recipe, source = inputs.recipe, inputs.source
    task = inputs.task.prepare(inputs.options, inputs.examples)
    processor, problems = task.load_processor(source)
    problems = [*problems, *task.check_model(processor, models.load_config(source), recipe)]
    raise_if_fatal(problems, InputError, strict)
    keys = {name: encoding_key(task, split, processor) for name, split in inputs.examples.items()}
    tables = {name: encode(task, split, processor, keys[name]) for name, split in inputs.examples.items()}
    for name, table in tables.items():
        problems += task.check_encoded(name, task.wrap(table, processor), recipe)
    raise_if_fatal(problems, InputError, strict)
    splits = {name: split.fingerprint for name, split in inputs.examples.items()}
    identity = {"source": models.fingerprint(source), **splits}
    columns = inputs.task.columns(inputs.options)
    examples = {name: without_content(split, columns) for name, split in inputs.examples.items()}
    return Prepared(recipe, source, task, processor, examples, tables, keys, identity, inputs.warnings + problems)


def prepare(recipe: Recipe, strict: bool = False) -> Prepared:
    """Read and encode what the recipe names; raises InputError."""
    return encode_inputs(read_inputs(recipe, strict), strict)


def read_examples(recipe: Recipe, task: type[Task], options: Any) -> dict[str, Examples]:
    """Return the splits of the recipe's data, missing ones cut, limits applied."""
    limit = recipe.target.limit.model_copy(update={"train": num_streamed(recipe) or recipe.target.limit.train})
    found = open_splits(recipe, task.columns(options))
    stratify = task.stratify_by(options, found["train"])
    grouped = [column for column in task.columns(options) if not column.field.is_target]
    seed = recipe.target.split.seed
    whole = splits.cut_missing_splits(found, recipe.target.split, stratify, grouped)
    limited = splits.limit_examples(whole, limit, stratify, seed)
    weights = recipe.target.data.weights if isinstance(recipe.target.data, Data) else None
    return limited if weights is None else {**limited, "train": apply_weights(limited["train"], weights, seed)}


def without_content(examples: Examples, columns: Sequence[Column]) -> Examples:
    """Return the examples with what of their values names them, small enough to be sent to workers."""
    table = examples.table
    for column in columns:
        if column.name in table.column_names:
            values = column.field.without_content(table.column(column.name))
            table = table.set_column(table.column_names.index(column.name), column.name, values)
    return replace(examples, table=table)


def check_stream(train: Examples, recipe: Recipe) -> list[Problem]:
    """Return a warning where streamed data have fewer examples than the steps take."""
    steps, size = recipe.train.steps, recipe.train.global_batch_size
    wanted = num_streamed(recipe)
    if wanted is None or recipe.target.limit.train is not None or len(train) >= wanted:
        return []
    what = f"there are {len(train)} training examples, and {steps} steps of {size} take {wanted}: some are seen again"
    remedy = "lower train.steps, or add data, if each example is to be seen once"
    return [Problem(what, recipe.origin.where("train.steps"), remedy, fatal=False)]


def encoding_key(task: Task, examples: Examples, processor: Any) -> str:
    """Return the hash of everything that an encoded split depends on."""
    return cache.content_key(ENCODING_VERSION, examples.fingerprint, task.cache_parts(processor))


def encode(task: Task, examples: Examples, processor: Any, key: str) -> pa.Table:
    """Return an encoded split, from the cache where the same was encoded before."""
    return cache.cached_table(key, lambda: task.encode(examples, processor))


def _collect(problems: list[Problem], step: Callable[[], T]) -> T | None:
    """Return the step's result; or None, with its problems added to the list."""
    try:
        return step()
    except InputError as error:
        problems.extend(error.problems)
        return None
