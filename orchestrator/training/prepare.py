"""Everything that is settled before a worker starts: the source found, the data read, checked, split and encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from orchestrator import models
from orchestrator.data import cache, checks, splits
from orchestrator.data.examples import Examples
from orchestrator.data.sources import open_splits
from orchestrator.errors import InputError, Problem, raise_if_fatal
from orchestrator.models import SourceModel
from orchestrator.recipe import Recipe
from orchestrator.tasks import Encoded, Task, read_options

T = TypeVar("T")
ENCODING_VERSION = 1  # Part of the cache's key: raise it when `encode` changes what it makes of the same input.


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, found and read: the source model's files and the examples. Nothing is loaded yet."""

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
    tokenizer: Any
    examples: dict[str, Examples]
    tables: dict[str, pa.Table]
    """Encoded splits, by name."""
    identity: dict[str, str]
    """Fingerprints of the source and of each split: a run is only ever resumed on the same ones."""
    warnings: list[Problem]

    def encoded(self, split: str) -> Encoded:
        return self.task.wrap(self.tables[split], self.tokenizer)


def read_inputs(recipe: Recipe, strict: bool = False) -> Inputs:
    """Find the source, read and check the data.

    Raises:
        InputError: everything that is wrong with them, in one report.
    """
    problems: list[Problem] = []
    source = _collect(problems, lambda: models.find_source(recipe))
    chosen = _collect(problems, lambda: read_options(recipe))
    examples = _collect(problems, lambda: read_examples(recipe, *chosen)) if chosen else None
    if examples is not None and chosen is not None:
        problems += chosen[0].check(chosen[1], examples, recipe)
        problems += checks.check_sizes(examples, recipe.train.global_batch_size, recipe.origin)
    if source is None or chosen is None or examples is None:
        raise InputError(problems)
    return Inputs(recipe, source, *chosen, examples, raise_if_fatal(problems, InputError, strict))


def encode_inputs(inputs: Inputs, strict: bool = False) -> Prepared:
    """Encode the examples (or take them from the cache) with the source's tokenizer.

    Raises:
        InputError: what does not fit the source model.
    """
    recipe, source = inputs.recipe, inputs.source
    task = inputs.task.prepare(inputs.options, inputs.examples)
    tokenizer, problems = models.load_tokenizer(source)
    problems = [*problems, *task.check_model(tokenizer, models.load_config(source), recipe)]
    raise_if_fatal(problems, InputError, strict)
    tables = {name: encode(task, split, tokenizer) for name, split in inputs.examples.items()}
    for name, table in tables.items():
        problems += task.check_encoded(name, task.wrap(table, tokenizer), recipe)
    raise_if_fatal(problems, InputError, strict)
    splits = {name: split.fingerprint for name, split in inputs.examples.items()}
    identity = {"source": models.fingerprint(source), **splits}
    return Prepared(recipe, source, task, tokenizer, inputs.examples, tables, identity, inputs.warnings + problems)


def prepare(recipe: Recipe, strict: bool = False) -> Prepared:
    """Read and encode what the recipe names; raises InputError."""
    return encode_inputs(read_inputs(recipe, strict), strict)


def read_examples(recipe: Recipe, task: type[Task], options: Any) -> dict[str, Examples]:
    """The splits that the recipe's data come in, missing ones cut, limits applied."""
    found = open_splits(recipe, task.columns(options))
    stratify = task.stratify_by(options, found["train"])
    grouped = [column.name for column in task.columns(options) if column.kind == "text"]
    whole = splits.cut_missing_splits(found, recipe.target.split, stratify, grouped)
    return splits.limit_examples(whole, recipe.target.limit, stratify, recipe.target.split.seed)


def encode(task: Task, examples: Examples, tokenizer: Any) -> pa.Table:
    """A split as the model reads it, from the cache where the same was encoded before."""
    key = cache.content_key(ENCODING_VERSION, examples.fingerprint, task.cache_parts(tokenizer))
    return cache.cached_table(key, lambda: task.encode(examples, tokenizer))


def _collect(problems: list[Problem], step: Callable[[], T]) -> T | None:
    """The step's result; or None, its problems added to the list."""
    try:
        return step()
    except InputError as error:
        problems.extend(error.problems)
        return None
