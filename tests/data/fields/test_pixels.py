"""Pictures in Arrow tables: the same from any chunk, without copies; and work shared by threads in its order."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from orchestrator.data.cache import cached_table
from orchestrator.data.fields.pixels import BYTES_TOGETHER, Pixels, pixel_array, pixel_type, shards
from orchestrator.data.threads import map_in_threads

PICTURES = np.random.default_rng(0).integers(0, 256, (10, 4, 5, 3), dtype=np.uint8)
SCHEMA = pa.schema({"pixels": pixel_type(4, 5)})


def in_batches(fail_at: int | None = None) -> pa.RecordBatchReader:
    def make() -> Iterator[pa.RecordBatch]:
        for start in range(0, 10, 3):
            if start == fail_at:
                raise ValueError("a picture is broken")
            yield pa.record_batch([pixel_array(PICTURES[start : start + 3])], schema=SCHEMA)

    return pa.RecordBatchReader.from_batches(SCHEMA, make())


@pytest.mark.parametrize("rows", [[0], [9, 0, 3, 2, 3], list(range(10))])
def test_rows_are_taken_from_whichever_chunk_holds_them(rows: list[int]) -> None:
    pixels = Pixels.of(in_batches().read_all()["pixels"])
    assert (len(pixels), len(pixels.chunks)) == (10, 4)
    np.testing.assert_array_equal(pixels.take(np.array(rows)), PICTURES[rows])


def test_a_table_in_batches_is_kept_and_read_back_mapped() -> None:
    calls = []

    def build() -> pa.RecordBatchReader:
        calls.append(1)
        return in_batches()

    for _ in range(2):
        pixels = Pixels.of(cached_table("pictures in batches", build)["pixels"])
        np.testing.assert_array_equal(pixels.take(np.arange(10)), PICTURES)
        assert not pixels.chunks[0].flags.owndata
    assert len(calls) == 1


def test_without_a_cache_a_table_in_batches_is_built_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    table = cached_table("full disk", in_batches)
    np.testing.assert_array_equal(Pixels.of(table["pixels"]).take(np.arange(10)), PICTURES)
    assert list((tmp_path / "cache" / "tables").iterdir()) == []


def test_an_error_in_a_batch_is_raised_and_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="a picture is broken"):
        cached_table("broken", lambda: in_batches(fail_at=6))
    assert list((tmp_path / "cache" / "tables").iterdir()) == []


def test_parts_of_a_table_cover_its_rows_once() -> None:
    assert shards(0, 100) == []
    parts = shards(10, BYTES_TOGETHER // 4)
    assert [row for part in parts for row in part] == list(range(10))
    assert max(map(len, parts)) == 4
    assert max(map(len, shards(3, BYTES_TOGETHER * 2))) == 1


def test_work_in_threads_comes_back_in_order_and_not_far_ahead() -> None:
    done = []
    lock = threading.Lock()

    def work(item: int) -> int:
        with lock:
            done.append(item)
        return item * item

    num_items = 2000 * (os.cpu_count() or 1)
    results = map_in_threads(work, range(num_items))
    assert next(results) == 0
    assert len(done) < num_items / 2
    assert list(results) == [item * item for item in range(1, num_items)]


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_in_threads(lambda item: 1 // item, [1, 2, 0, 3]))
