"""Everything that is settled before a worker starts: the source found, the data read, checked, split and encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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
class Prepared:
    """A recipe with its source found and its data encoded. It can be sent to workers."""

    recipe: Recipe
    source: SourceModel
    task: Task
    examples: dict[str, Examples]
    tables: dict[str, pa.Table]
    """Encoded splits, by name."""
    identity: dict[str, str]
    """Fingerprints of the source and of each split: a run is only ever resumed on the same ones."""
    warnings: list[Problem]

    @cached_property
    def tokenizer(self) -> Any:
        return models.load_tokenizer(self.source)[0]

    def encoded(self, split: str) -> Encoded:
        return self.task.wrap(self.tables[split], self.tokenizer)


def prepare(recipe: Recipe, strict: bool = False) -> Prepared:
    """Find the source, read and check the data, encode it (or take it from the cache).

    Raises:
        InputError: everything that is wrong with recipe, source and data, in one report.
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
    raise_if_fatal(problems, InputError, strict)
    task = chosen[0].prepare(chosen[1], examples)
    tokenizer, notes = models.load_tokenizer(source)
    config = models.load_config(source)
    problems += notes + task.check_model(tokenizer, config, recipe)
    raise_if_fatal(problems, InputError, strict)
    tables = {name: encode(task, split, tokenizer) for name, split in examples.items()}
    for name, table in tables.items():
        problems += task.check_encoded(name, task.wrap(table, tokenizer), recipe)
    raise_if_fatal(problems, InputError, strict)
    identity = {"source": models.fingerprint(source), **{name: split.fingerprint for name, split in examples.items()}}
    return Prepared(recipe, source, task, examples, tables, identity, problems)


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
