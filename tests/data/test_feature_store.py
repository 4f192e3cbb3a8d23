"""The feature store: rows come back as they were; processes share the work, whatever happens to one of them."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.feature_store import (
    IN_USE,
    LAYOUT,
    VALUES,
    FeatureStore,
    Layout,
    StoredFeatures,
    Writer,
    wait_for_others,
)

KEY = "a" * 64
ROWS, ROWS_PER_SHARD = 40, 5
NUM_STRETCHES = ROWS // ROWS_PER_SHARD
RAGGED = Layout((3,), "float32", ROWS, tuple(1 + 7 * row % 11 for row in range(ROWS)))
EVEN = Layout((2, 3), "uint16", ROWS)
MEGABYTE = Layout((250_000,), "float32", 1)


def row_of(layout: Layout, row: int) -> npt.NDArray[Any]:
    """Return the content of a test's row, a function of its number."""
    shape = layout.shape if layout.lengths is None else (layout.lengths[row], *layout.shape)
    return np.random.default_rng(row).integers(1, 1000, shape).astype(layout.dtype)


def compute(folder: Path, layout: Layout, log: Path, die_at: int | None = None, seconds: float = 0.0) -> None:
    """Take part in computing an entry, as a training does; each shard that is written is noted in the log.

    Args:
        die_at: the shard in the middle of which the process ends; None for none.
        seconds: that a shard takes.
    """
    store = FeatureStore(folder)
    writer = store.writer(KEY, layout, NUM_STRETCHES, "float32")
    while not writer.is_complete:
        idle = True
        for shard in range(NUM_STRETCHES):
            if writer.is_done(shard):
                continue
            with writer.claim(shard) as mine:
                if mine and not writer.is_done(shard):
                    idle = False
                    write_shard(writer, layout, shard, die_at, seconds)
                    with log.open("a") as file:
                        file.write(f"{shard}\n")
                    writer.mark_done(shard)
        if idle:
            wait_for_others()
    writer.close()
    check_rows(store.finish(KEY), layout)


def write_shard(writer: Writer, layout: Layout, shard: int, die_at: int | None, seconds: float) -> None:
    for row in range(shard * ROWS_PER_SHARD, (shard + 1) * ROWS_PER_SHARD):
        if shard == die_at and row % ROWS_PER_SHARD == 2:
            os._exit(9)
        writer.write(row, row_of(layout, row))
        time.sleep(seconds / ROWS_PER_SHARD)


def check_rows(rows: StoredFeatures, layout: Layout) -> None:
    for row in range(layout.num_rows):
        found = rows.take(np.array([row]))[0]
        expected = row_of(layout, row)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


def start(*arguments: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=compute, args=arguments)
    process.start()
    return process


def fill(store: FeatureStore, key: str, layout: Layout = MEGABYTE) -> None:
    """An entry of one shard, written at once."""
    writer = store.writer(key, layout, 1)
    for row in range(layout.num_rows):
        writer.write(row, row_of(layout, row))
    writer.mark_done(0)
    writer.close()
    store.finish(key)


def keys_of(store: FeatureStore) -> set[str]:
    return {path.name for path in store.folder.iterdir() if path.is_dir()}


@pytest.mark.parametrize("layout", [RAGGED, EVEN], ids=["ragged", "even"])
def test_rows_come_back_exactly_and_are_closed_to_others(layout: Layout, tmp_path: Path) -> None:
    compute(tmp_path / "store", layout, tmp_path / "log")
    entry = tmp_path / "store" / KEY
    for path in (tmp_path / "store", entry):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    rows = FeatureStore(tmp_path / "store").open(KEY)
    assert rows is not None
    check_rows(rows, layout)
    assert rows.note == "float32"
    assert rows.layout == layout
    assert (entry / "values.bin").stat().st_size == layout.num_bytes


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    width=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
    extra=st.integers(0, 3),
)
def test_any_rows_in_any_order_are_padded_with_zeros_and_written_from_padded_ones(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], width: int, order: Any, extra: int
) -> None:
    layout = Layout((width,), "float32", len(lengths), tuple(lengths))
    store = FeatureStore(tmp_path_factory.mktemp("store"))
    writer = store.writer(KEY, layout, 1)
    for row, length in enumerate(lengths):
        # What stands in the padding of a batch must not come back.
        padded = np.full((length + extra, width), 7e7, np.float32)
        padded[:length] = row_of(layout, row)
        writer.write(row, padded)
    writer.close()
    rows = store.finish(KEY)
    asked = np.array(order.choices(range(len(lengths)), k=5))
    longest = max(lengths[row] for row in asked)
    for length in (None, longest + 2):
        found = rows.take(asked, length)
        assert found.shape == (5, length or longest, width)
        for line, row in zip(found, asked, strict=True):
            assert np.array_equal(line[: lengths[row]], row_of(layout, int(row)))
            assert not line[lengths[row] :].any()


@pytest.mark.parametrize("layout", [RAGGED, EVEN], ids=["ragged", "even"])
def test_processes_compute_an_entry_together_each_shard_once(layout: Layout, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start(tmp_path / "store", layout, log, None, 0.1) for _ in range(3)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(map(int, log.read_text().split())) == list(range(NUM_STRETCHES))
    assert keys_of(FeatureStore(tmp_path / "store")) == {KEY}


def test_what_a_killed_process_left_is_taken_over_and_what_it_finished_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    killed = start(tmp_path / "store", RAGGED, log, 3, 0.0)
    killed.join(30)
    assert killed.exitcode == 9
    store = FeatureStore(tmp_path / "store")
    assert store.open(KEY) is None
    assert keys_of(store) == {f"{KEY}.partial"}
    compute(store.folder, RAGGED, log)
    assert list(map(int, log.read_text().split())) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_process_that_waits_takes_over_from_one_that_dies(tmp_path: Path) -> None:
    log = tmp_path / "log"
    dying = start(tmp_path / "store", RAGGED, log, 0, 2.0)
    values = tmp_path / "store" / f"{KEY}.partial" / VALUES
    until = time.monotonic() + 30
    while not (values.exists() and np.fromfile(values, "float32")[:3].any()):  # It is in the middle of its shard.
        assert time.monotonic() < until
        time.sleep(0.01)
    assert dying.is_alive()
    compute(tmp_path / "store", RAGGED, log)
    dying.join(30)
    assert dying.exitcode == 9
    assert list(map(int, log.read_text().split())) == [1, 2, 3, 4, 5, 6, 7, 0]


def test_an_entry_is_there_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    writer = store.writer(KEY, EVEN, NUM_STRETCHES)
    for shard in range(NUM_STRETCHES):
        assert store.open(KEY) is None
        assert not writer.is_complete
        write_shard(writer, EVEN, shard, None, 0.0)
        writer.mark_done(shard)
    assert writer.is_complete
    assert store.open(KEY) is None
    writer.close()
    check_rows(store.finish(KEY), EVEN)
    assert store.open(KEY) is not None


def test_what_was_complete_but_not_named_so_is_not_computed_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    compute(tmp_path / "store", RAGGED, log)
    (tmp_path / "store" / KEY).rename(tmp_path / "store" / f"{KEY}.partial")
    log.unlink()
    compute(tmp_path / "store", RAGGED, log)
    assert not log.exists()


def test_who_comes_when_an_entry_has_just_got_whole_has_nothing_to_compute(tmp_path: Path) -> None:
    log = tmp_path / "log"
    store = FeatureStore(tmp_path / "store")
    assert store.open(KEY) is None
    compute(store.folder, RAGGED, log)  # Another process, after this one's look.
    writer = store.writer(KEY, RAGGED, NUM_STRETCHES)
    assert writer.is_complete
    writer.close()
    check_rows(store.finish(KEY), RAGGED)
    assert keys_of(store) == {KEY}


def test_whoever_finishes_second_finds_the_entry_of_the_first(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    first, second = (store.writer(KEY, EVEN, NUM_STRETCHES) for _ in range(2))
    for shard in range(NUM_STRETCHES):
        write_shard(first, EVEN, shard, None, 0.0)
        first.mark_done(shard)
    assert second.is_complete
    check_rows(store.finish(KEY), EVEN)
    check_rows(store.finish(KEY), EVEN)
    for writer in (first, second):
        writer.close()


def test_without_a_budget_half_of_what_is_free_may_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path)
    fill(store, "one")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"total": 10**9, "free": 7_000_000}))
    assert store.num_bytes() == 1_000_000
    assert store.budget == 4_000_000


@pytest.fixture
def full_store(tmp_path: Path) -> FeatureStore:
    """Three entries of a megabyte each, the oldest first, in a store of 3.5 MB."""
    store = FeatureStore(tmp_path, budget=3_500_000)
    for age, key in enumerate(("old", "middle", "new")):
        fill(store, key)
        os.utime(store.folder / key / LAYOUT, (1000 + age, 1000 + age))
    return store


def test_what_was_read_longest_ago_goes_first_and_no_more_than_has_to(full_store: FeatureStore) -> None:
    assert full_store.make_room(500_000) is None
    assert keys_of(full_store) == {"old", "middle", "new"}
    assert full_store.make_room(1_000_000) is None
    assert keys_of(full_store) == {"middle", "new"}
    opened = full_store.open("middle")
    assert opened is not None
    del opened  # It has been read just now, and nobody holds it any more.
    assert full_store.make_room(2_000_000) is None
    assert keys_of(full_store) == {"middle"}


def test_entries_in_use_stay_here_and_in_other_processes(full_store: FeatureStore) -> None:
    held = full_store.open("old")
    with (full_store.folder / "middle" / IN_USE).open("w") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_SH)
        reason = full_store.make_room(3_000_000)
    assert keys_of(full_store) == {"old", "middle"}
    assert reason is not None
    assert reason.startswith("it needs 3.00 MB of disk in ")
    assert reason.endswith(", and 1.50 MB are left for it")
    assert held is not None
    assert held.take(np.array([0])).shape == (1, 250_000)


def test_an_entry_that_is_being_written_stays_also_between_its_shards(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store", budget=1_200_000)
    writer = store.writer(KEY, MEGABYTE, 2)
    writer.mark_done(0)
    assert store.make_room(1_000_000) is not None
    assert keys_of(store) == {f"{KEY}.partial"}
    writer.close()
    assert store.make_room(1_000_000) is None
    assert keys_of(store) == set()


def test_what_a_killed_process_began_can_go(tmp_path: Path) -> None:
    killed = start(tmp_path / "store", RAGGED, tmp_path / "log", 3, 0.0)
    killed.join(30)
    store = FeatureStore(tmp_path / "store", budget=RAGGED.num_bytes)
    assert store.make_room(RAGGED.num_bytes) is None
    assert keys_of(store) == set()


def test_entries_that_are_wanted_stay(full_store: FeatureStore) -> None:
    assert full_store.make_room(1_500_000, but=frozenset({"old"})) is None
    assert keys_of(full_store) == {"old", "new"}


def test_nothing_goes_for_what_will_never_fit(full_store: FeatureStore) -> None:
    reason = full_store.make_room(4_000_000)
    assert reason == f"it needs 4.00 MB of disk in {full_store.folder}, and 3.50 MB are left for it"
    assert full_store.make_room(200_000_000_000) is not None
    assert keys_of(full_store) == {"old", "middle", "new"}


def test_a_part_of_the_disk_is_left_to_others(full_store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"total": 20_000_000, "free": 1_200_000}))
    assert full_store.make_room(200_000) is None
    assert keys_of(full_store) == {"old", "middle", "new"}
    assert full_store.make_room(300_000) is None
    assert keys_of(full_store) == {"middle", "new"}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(file: int, start: int, size: int) -> None:
        os.ftruncate(file, size // 2)  # As far as a file system without the system call may get.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        yield


def test_a_full_disk_is_told_at_once_and_keeps_nothing(tmp_path: Path, full_disk: None) -> None:
    store = FeatureStore(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="No space left on device"):
        store.writer(KEY, MEGABYTE, 1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert store.num_bytes() == 0


def test_what_is_begun_but_not_reserved_is_still_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path)
    assert store.bytes_to_come(KEY, MEGABYTE) == 1_000_000
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        store.writer(KEY, MEGABYTE, 1)
    assert store.bytes_to_come(KEY, MEGABYTE) == 1_000_000
    store.writer(KEY, MEGABYTE, 1).close()
    assert store.bytes_to_come(KEY, MEGABYTE) == 0


def test_the_layout_is_whole_while_several_write_it(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    writers = [store.writer(KEY, RAGGED, NUM_STRETCHES, "bfloat16") for _ in range(5)]
    described = json.loads((tmp_path / f"{KEY}.partial" / LAYOUT).read_text())
    assert described["note"] == "bfloat16"
    assert [path.name for path in (tmp_path / f"{KEY}.partial").glob(f"{LAYOUT}*")] == [LAYOUT]
    for writer in writers:
        writer.close()
