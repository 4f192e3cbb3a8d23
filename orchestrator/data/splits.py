"""Cut the splits that the data lack, and limit examples. Neither depends on `train.seed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from orchestrator.data.examples import Examples, Indices
from orchestrator.data.fields.columns import Column
from orchestrator.data.mixing import draw_ranks
from orchestrator.data.overlap import exact_keys, near_keys
from orchestrator.errors import DataError, Problem
from orchestrator.recipe.schema import Limit, Split


def cut_missing_splits(
    splits: Mapping[str, Examples], split: Split, stratify: str | None, group_by: Sequence[Column]
) -> dict[str, Examples]:
    """Return all three splits (or *train* and *select*, when `split.test` is 0): missing ones are cut from *train*.

    Each class gives its share (`stratify` names a column of text or whole numbers). Rows with nearly the same
    values in the `group_by` columns (see `overlap.near_keys`) stay on one side. Every class keeps training
    examples: one that is too rare to be cut stays in *train*. The draw goes by a hash of the seed and the text.

    Raises:
        DataError: *select* is missing and its share is 0, the shares leave no training data, or there is too little.
    """
    train = splits["train"]
    shares = {name: share for name, share in (("test", split.test), ("select", split.select)) if name not in splits}
    if shares.get("select") == 0.0:
        remedy = "name a select split in target.data, or set target.split.select to about 0.1"
        raise DataError(Problem("select is needed, but the data have none and its share is 0", "target.split", remedy))
    if sum(shares.values()) >= 1.0:
        what = f"the shares that are cut from train leave nothing of it: {shares}"
        raise DataError(Problem(what, "target.split", "lower target.split.select or target.split.test"))
    shares = {name: share for name, share in shares.items() if share > 0.0}
    parts = _cut(_strata(train, stratify, group_by, split.seed), list(shares.values()))
    cut = dict(zip(shares, parts, strict=True))
    for name, rows in cut.items():
        if not len(rows):
            what = f"{len(train)} training examples are too few to cut {name} from them"
            raise DataError(Problem(what, "target.split", f"add examples (two of each class), or name a {name} split"))
    taken = np.concatenate([np.zeros(0, dtype=np.int64), *cut.values()])
    left = np.setdiff1d(np.arange(len(train)), taken)
    every = {**splits, "train": train.take(left), **{name: train.take(rows) for name, rows in cut.items()}}
    return {name: every[name] for name in ("train", "select", "test") if name in every}


def limit_examples(
    splits: Mapping[str, Examples], limit: Limit, stratify: str | None, seed: int
) -> dict[str, Examples]:
    """Return at most as many examples of each split as the limits say, and of each class of *train*.

    Draws are stratified and nested: with one seed, the 100 examples are among the 200. Every class has one first, then
    its share.

    Raises:
        DataError: `limit.per_class` where there are no classes.
    """
    limited = {}
    for split, examples in splits.items():
        total: int | None = getattr(limit, split)
        per_class = limit.per_class if split == "train" else None
        if total is None and per_class is None:
            limited[split] = examples
            continue
        classes = _classes(examples, stratify)
        if per_class is not None and classes is None:
            what = "there are no classes to limit the examples of"
            raise DataError(Problem(what, "target.limit.per_class", "set target.limit.train instead"))
        rows = _nested_order(np.zeros(len(examples), np.int64) if classes is None else classes, per_class, seed)
        limited[split] = examples.take(np.sort(rows[:total]))
    return limited


def _nested_order(classes: Indices, per_class: int | None, seed: int) -> Indices:
    """Return rows in an order whose every beginning is a stratified sample; at most `per_class` of a class."""
    ranks_by_hash = draw_ranks(range(len(classes)), seed)
    order = np.array(sorted(range(len(classes)), key=ranks_by_hash.__getitem__), dtype=np.int64)
    ranks = np.zeros(len(classes), dtype=np.int64)
    seen: dict[int, int] = {}
    for row in order.tolist():
        ranks[row] = seen.get(int(classes[row]), 0)
        seen[int(classes[row])] = int(ranks[row]) + 1
    sizes = np.array([seen[int(number)] for number in classes], dtype=np.float64)
    # Spreads the examples of a class evenly over the order.
    places = (ranks + 0.5) / sizes
    places_drawn = np.empty(len(classes), dtype=np.int64)
    places_drawn[order] = np.arange(len(classes))
    ordered = np.lexsort((places_drawn, places, ranks > 0))
    return ordered if per_class is None else ordered[ranks[ordered] < per_class]


def _classes(examples: Examples, stratify: str | None) -> Indices | None:
    """Return a number for each row's class, shape [n]; None where the column holds no single classes."""
    if stratify is None:
        return None
    values = examples.table.column(stratify)
    if not (pa.types.is_string(values.type) or pa.types.is_integer(values.type)):
        return None
    encoded = values.combine_chunks().dictionary_encode(null_encoding="encode")
    return np.asarray(encoded.indices.to_numpy(), dtype=np.int64)


def _strata(examples: Examples, stratify: str | None, group_by: Sequence[Column], seed: int) -> list[list[list[int]]]:
    """Return for each class the groups of rows that must stay together, in the order of the draw."""
    columns = [column for column in group_by if column.name in examples.table.column_names]
    numbers = list(range(len(examples)))
    exact = exact_keys(examples, columns).to_pylist() if columns else numbers
    near = near_keys(examples, columns).to_pylist() if columns else numbers
    classes = _classes(examples, stratify)
    strata: dict[int, list[list[int]]] = {}
    for rows in _group(numbers, near):
        strata.setdefault(0 if classes is None else int(classes[rows[0]]), []).append(rows)
    drawn = []
    for groups in strata.values():
        # Where a quarter of a class differs only in digits, digits count, because little could be cut otherwise.
        most = sum(map(len, groups)) / 4
        units = [unit for group in groups for unit in (_group(group, exact) if len(group) > most else [group])]
        ranks = draw_ranks([exact[unit[0]] for unit in units], seed)
        drawn.append([unit for _, unit in sorted(zip(ranks, units, strict=True))])
    return drawn


def _group(rows: Sequence[int], keys: Sequence[object]) -> list[list[int]]:
    """Return rows with the same key together; a row without a key is a group of its own. `keys` are of all rows."""
    groups: dict[object, list[int]] = {}
    for row in rows:
        groups.setdefault(("no key", row) if keys[row] is None else keys[row], []).append(row)
    return list(groups.values())


def _cut(strata: list[list[list[int]]], shares: Sequence[float]) -> list[Indices]:
    """Return the rows of each part, by its share of all rows; the parts are disjoint."""
    parts: list[Indices] = []
    next_group = [0] * len(strata)
    sizes = np.array([sum(map(len, stratum)) for stratum in strata], dtype=np.float64)
    for share in shares:
        quotas = _round_quotas(sizes * share)
        taken: list[int] = []
        for number, stratum in enumerate(strata):
            count = 0
            # The last group of a class stays in train.
            while count < quotas[number] and next_group[number] < len(stratum) - 1:
                group = stratum[next_group[number]]
                taken.extend(group)
                count += len(group)
                next_group[number] += 1
        parts.append(np.sort(np.array(taken, dtype=np.int64)))
    return parts


def _round_quotas(exact: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Indices:
    """Return whole numbers near `exact` with the same sum (largest remainder), at least 1 in all."""
    quotas = np.floor(exact).astype(np.int64)
    total = max(1, round(float(exact.sum())))
    for number in np.argsort(quotas - exact, kind="stable")[: max(0, total - int(quotas.sum()))]:
        quotas[number] += 1
    return quotas
