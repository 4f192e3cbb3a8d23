"""Batches: every example once, in an order that is a function of seed and epoch alone, dealt out evenly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.batches import (
    BATCHES_SORTED_TOGETHER,
    BatchOrder,
    Indices,
    assign,
    cheapest_cuts,
    evaluation_batches,
)

lengths_of_examples = st.lists(st.integers(1, 50), min_size=1, max_size=200).map(
    lambda values: np.array(values, np.int64)
)


def padded_size(batches: list[Indices], lengths: Indices) -> int:
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


@given(lengths_of_examples, st.integers(1, 4), st.integers(1, 32), st.integers(0, 100), st.integers(1, 400))
def test_no_pass_has_more_tokens_than_it_may_but_for_a_single_example(
    lengths: Indices, workers: int, size: int, cost: int, most: int
) -> None:
    passes = assign(np.arange(len(lengths)), lengths, workers, size, cost, most)
    assert sorted(np.concatenate([mine for hands in passes for mine in hands]).tolist()) == list(range(len(lengths)))
    for mine in (mine for hands in passes for mine in hands if len(mine)):
        assert len(mine) <= size
        assert len(mine) == 1 or len(mine) * lengths[mine].max() <= most


def test_short_examples_stay_together_where_long_ones_need_passes_of_their_own() -> None:
    lengths = np.array([4] * 16 + [64] * 2)
    passes = assign(np.arange(18), lengths, 1, 32, 1000, 64)
    assert [len(mine) for (mine,) in passes] == [16, 1, 1]


@given(lengths_of_examples, st.integers(1, 40), st.booleans(), st.integers(0, 2**31 - 1), st.integers(0, 5))
def test_every_example_stands_once_in_an_epoch(
    lengths: Indices, size: int, grouped: bool, seed: int, epoch: int
) -> None:
    order = BatchOrder(lengths, size, grouped, seed)
    batches = order.epoch(epoch)
    assert len(batches) == order.steps_per_epoch
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)


@given(lengths_of_examples, st.integers(1, 40), st.booleans(), st.integers(0, 2**31 - 1), st.integers(0, 5))
def test_the_order_is_a_function_of_seed_and_epoch(
    lengths: Indices, size: int, grouped: bool, seed: int, epoch: int
) -> None:
    used = BatchOrder(lengths, size, grouped, seed)
    for earlier in range(epoch):
        used.epoch(earlier)
    anew = BatchOrder(lengths.copy(), size, grouped, seed)
    for one, other in zip(used.epoch(epoch), anew.epoch(epoch), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("grouped", [True, False])
def test_seeds_and_epochs_differ_in_their_order(grouped: bool) -> None:
    lengths = np.arange(100) % 13
    orders = {
        tuple(np.concatenate(BatchOrder(lengths, 8, grouped, seed).epoch(epoch)).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_grouping_by_length_saves_padding_and_keeps_the_batches_shuffled() -> None:
    lengths = np.random.default_rng(0).integers(1, 129, size=2000)
    grouped = BatchOrder(lengths, 16, True, 0).epoch(0)
    plain = BatchOrder(lengths, 16, False, 0).epoch(0)
    assert padded_size(grouped, lengths) < 1.1 * lengths.sum()
    assert padded_size(plain, lengths) > 1.6 * lengths.sum()
    longest = [int(lengths[batch].max()) for batch in grouped]
    assert longest != sorted(longest)


def test_grouping_pairs_examples_anew_in_every_epoch() -> None:
    lengths = np.full(16 * BATCHES_SORTED_TOGETHER * 2, 7)
    order = BatchOrder(lengths, 16, True, 0)
    first, second = ({frozenset(batch.tolist()) for batch in order.epoch(epoch)} for epoch in (0, 1))
    assert not first & second


@given(lengths_of_examples, st.integers(1, 6), st.integers(1, 20))
def test_dealing_covers_the_batch_and_workers_differ_by_one_at_most(
    lengths: Indices, num_workers: int, micro_batch_size: int
) -> None:
    batch = np.random.default_rng(0).permutation(len(lengths))
    passes = assign(batch, lengths, num_workers, micro_batch_size, cost_of_pass=7)
    assert sorted(np.concatenate([rows for part in passes for rows in part]).tolist()) == sorted(batch.tolist())
    for part in passes:
        sizes = [len(rows) for rows in part]
        assert len(sizes) == num_workers
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= micro_batch_size


def test_a_micro_batch_holds_examples_of_like_length() -> None:
    lengths = np.array([9, 1, 8, 2, 7, 3, 6, 4])
    (short, long) = assign(np.arange(8), lengths, 2, 2, cost_of_pass=100)
    assert sorted(lengths[np.concatenate(short)]) == [1, 2, 3, 4]
    assert sorted(lengths[np.concatenate(long)]) == [6, 7, 8, 9]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3), st.integers(1, 4), st.integers(0, 40))
def test_no_other_way_to_cut_a_batch_costs_less(
    lengths: list[int], num_workers: int, micro_batch_size: int, cost_of_pass: int
) -> None:
    ascending = np.sort(np.array(lengths))

    def cost(cuts: Sequence[int]) -> float:
        parts = np.split(ascending, cuts)
        if any(len(part) > num_workers * micro_batch_size for part in parts):
            return math.inf
        return sum(cost_of_pass + math.ceil(len(part) / num_workers) * int(part[-1]) for part in parts)

    places = range(1, len(lengths))
    every_way = [cuts for count in range(len(lengths)) for cuts in combinations(places, count)]
    found = cheapest_cuts(ascending, num_workers, micro_batch_size, cost_of_pass)
    assert cost(found) == min(map(cost, every_way))


@given(lengths_of_examples, st.integers(1, 20), st.integers(1, 6), st.sampled_from([1, 20, 10_000]))
def test_evaluation_covers_a_split_once_in_equally_many_passes(
    lengths: Indices, batch_size: int, num_workers: int, cost: int
) -> None:
    shares = [list(evaluation_batches(lengths, batch_size, num_workers, rank, cost)) for rank in range(num_workers)]
    assert len({len(share) for share in shares}) == 1
    rows = np.concatenate([batch for share in shares for batch in share])
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert max(len(batch) for share in shares for batch in share) <= batch_size


def test_evaluation_begins_with_the_longest() -> None:
    lengths = np.array([3, 9, 1, 7])
    (first, _) = evaluation_batches(lengths, 2, 1, 0, 100)
    assert lengths[first].tolist() == [9, 7]


def test_evaluation_does_not_pad_short_examples_to_long_ones_where_passes_cost_little() -> None:
    lengths = np.array([3, 90, 3, 85, 2])
    passes = list(evaluation_batches(lengths, 5, 1, 0, 10))
    assert [lengths[rows].tolist() for rows in passes] == [[90, 85], [3, 3, 2]]
