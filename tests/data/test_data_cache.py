"""The cache: whole tables or none, whoever writes and whatever happens to the files."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from orchestrator.data.cache import cache_folder, cached_table, content_key

TABLE = pa.table({"ids": pa.array([[1, 2], [], [3]], pa.list_(pa.int32())), "label": [0, 1, 0]})


class Builder:
    """Counts how often the table was built."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> pa.Table:
        self.count += 1
        return TABLE


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def only_file(folder: Path) -> Path:
    files = list((folder / "tables").iterdir())
    assert len(files) == 1
    return files[0]


def test_a_table_is_built_once(folder: Path) -> None:
    build = Builder()
    assert cached_table("key", build) == TABLE
    assert cached_table("key", build) == TABLE
    assert build.count == 1
    assert cached_table("other", build) == TABLE
    assert build.count == 2


def test_the_folder_is_closed_to_others(folder: Path) -> None:
    assert cache_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0


def test_the_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORCHESTRATOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "transfer-orchestrator"


def test_a_file_cut_off_anywhere_is_rebuilt(folder: Path) -> None:
    build = Builder()
    cached_table("key", build)
    whole = only_file(folder).read_bytes()
    for count, size in enumerate((0, 1, 31, 32, len(whole) // 2, len(whole) - 1), start=2):
        only_file(folder).write_bytes(whole[:size])
        assert cached_table("key", build) == TABLE
        assert build.count == count
        assert only_file(folder).read_bytes() == whole


def test_a_flipped_byte_is_noticed(folder: Path) -> None:
    build = Builder()
    cached_table("key", build)
    whole = only_file(folder).read_bytes()
    for position in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        only_file(folder).write_bytes(damaged)
        assert cached_table("key", build) == TABLE
    assert build.count == 1 + len(range(0, len(whole), 97))


def test_without_a_folder_the_table_is_built_in_memory(folder: Path) -> None:
    folder.write_text("a file stands where the folder should be")
    build = Builder()
    assert cached_table("key", build) == TABLE
    assert cached_table("key", build) == TABLE
    assert build.count == 2


def test_a_failing_write_leaves_the_table_and_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    assert cached_table("key", Builder()) == TABLE
    assert list((folder / "tables").iterdir()) == []


def test_several_writers_leave_one_whole_file(folder: Path) -> None:
    script = (
        "import pyarrow as pa, time\n"
        "from orchestrator.data.cache import cached_table\n"
        "def build():\n"
        "    time.sleep(0.3)\n"
        "    return pa.table({'n': list(range(50000))})\n"
        "assert cached_table('key', build).num_rows == 50000\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script], env=os.environ) for _ in range(3)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    only_file(folder)
    build = Builder()
    assert cached_table("key", build).num_rows == 50_000
    assert build.count == 0


def test_a_key_depends_on_every_part_and_not_on_the_order_of_a_mapping() -> None:
    assert content_key({"a": 1, "b": [1, 2]}, "x") == content_key({"b": [1, 2], "a": 1}, "x")
    keys = {content_key("a", "b"), content_key("ab"), content_key("a", ["b"]), content_key(1), content_key("1")}
    assert len(keys) == 5
