"""Data that are streamed: no more is read than asked for, from many places, and what is read is what is there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import orchestrator
from orchestrator.data import Examples, open_splits
from orchestrator.data.formats import hub, json_files
from orchestrator.data.formats.raw import BYTE_ORDER_MARK
from orchestrator.data.formats.streamed_files import StreamedLines, StreamedTables
from orchestrator.data.streaming import round_robin
from orchestrator.errors import DataError
from orchestrator.recipe import Recipe
from orchestrator.training.prepare import read_inputs

FORMATS = ("jsonl", "parquet", "arrow")
ROW_GROUP = 25
Rows = list[dict[str, Any]]


def make_rows(number: int, classes: int = 4, name: str = "") -> Rows:
    """Sorted by label."""
    return [{"text": f"text {name}{row} {'x' * (row % 7)}", "label": row * classes // number} for row in range(number)]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=ROW_GROUP)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def read(tmp_path: Path, columns: Any) -> Callable[..., dict[str, Examples]]:
    """The splits of files; `limit` examples of them, or all in the usual way."""
    other = write(tmp_path / "other.jsonl", make_rows(8, name="other "))

    def read(train: Any, limit: int | None = None, seed: int = 0, **data: Any) -> dict[str, Examples]:
        paths = [str(path) for path in train] if isinstance(train, list) else str(train)
        data = {"train": paths, "select": str(other), "test": str(other), "stream": limit is not None, **data}
        target = {"task": "text-classification", "data": data, "limit": {"train": limit}, "split": {"seed": seed}}
        recipe = {"name": "test", "source": {"model": "some/model"}, "target": target}
        return open_splits(Recipe.model_validate(recipe), columns)

    return read


def texts(examples: Examples) -> list[str]:
    return examples.table["text"].to_pylist()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_stream_that_is_long_enough_is_the_same_as_no_stream(tmp_path: Path, read: Any, suffix: str) -> None:
    paths = [write(tmp_path / f"{name}.{suffix}", make_rows(size, name=name)) for name, size in (("b", 90), ("a", 13))]
    whole, streamed = (read(paths, limit)["train"] for limit in (None, 103))
    assert texts(streamed) == texts(whole)
    assert streamed.fingerprint == whole.fingerprint
    assert [streamed.where(row) for row in range(103)] == [whole.where(row) for row in range(103)]
    assert read(paths, 5000)["train"].fingerprint == whole.fingerprint


@pytest.mark.parametrize("suffix", FORMATS)
def test_so_many_examples_are_drawn_each_with_its_place(tmp_path: Path, read: Any, suffix: str) -> None:
    rows = make_rows(500)
    train = read(write(tmp_path / f"train.{suffix}", rows), 90)["train"]
    assert len(train) == len(set(texts(train))) == 90
    for place, text in enumerate(texts(train)):
        number = int(text.split()[1])
        assert train.where(place).endswith(f":{number + 1}" if suffix == "jsonl" else f" row {number}")
    assert texts(train.take([7, 3]))[0] == texts(train)[7]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("limit", [20, 200])
def test_a_sorted_file_gives_all_of_its_classes(tmp_path: Path, read: Any, suffix: str, limit: int) -> None:
    train = read(write(tmp_path / f"train.{suffix}", make_rows(5000)), limit)["train"]
    counts = Counter(train.table["label"].to_pylist())
    assert len(counts) == 4
    assert min(counts.values()) >= limit / 4 * 0.3


@pytest.mark.parametrize("suffix", FORMATS)
def test_several_files_give_examples_in_proportion_to_their_size(tmp_path: Path, read: Any, suffix: str) -> None:
    files = [
        write(tmp_path / f"{name}.{suffix}", make_rows(size, name=name)) for name, size in (("a", 3000), ("b", 1000))
    ]
    counts = Counter(text.split()[1][0] for text in texts(read(files, 400)["train"]))
    assert counts["b"] == pytest.approx(100, abs=30)


def test_weights_say_how_much_of_each_file_is_read(tmp_path: Path, read: Any) -> None:
    files = [write(tmp_path / f"{name}.jsonl", make_rows(1000, name=name)) for name in "ab"]
    counts = Counter(text.split()[1][0] for text in texts(read(files, 100, weights=[1.0, 3.0])["train"]))
    assert counts == {"a": 25, "b": 75}


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_seed_of_the_split_alone_says_which_examples(tmp_path: Path, read: Any, suffix: str) -> None:
    file = write(tmp_path / f"train.{suffix}", make_rows(5000))
    draws = [tuple(texts(read(file, 50, seed=seed)["train"])) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_no_more_lines_are_read_than_asked_for(tmp_path: Path, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "train.jsonl", make_rows(20_000))
    decoded: list[str] = []
    decode = json_files._decode
    monkeypatch.setattr(json_files, "_decode", lambda line: decoded.append(line) or decode(line))
    read(file, 640)
    # Those of the other splits are read whole; a turn of each place may be under way when there is enough.
    assert 640 + 16 <= len(decoded) <= 640 + 16 + 10


def test_no_more_row_groups_are_read_than_asked_for(tmp_path: Path, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "train.parquet", make_rows(10_000))
    asked: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def note(self: Any, size: int, groups: list[int], names: list[str]) -> Any:
        assert names == ["text", "label"]
        asked.extend(groups)
        return iter_batches(self, size, groups, names)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", note)
    assert len(read(file, 640)["train"]) == 640
    assert len(asked) == len(set(asked)) == 64
    assert len(asked) < 10_000 / ROW_GROUP / 4


def test_columns_that_nobody_asks_for_are_not_kept(tmp_path: Path, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**row, "odd": [1, "a"][number % 2]} for number, row in enumerate(make_rows(100))]
    kept: list[Any] = []
    raw_rows = json_files.raw_rows
    monkeypatch.setattr(
        "orchestrator.data.formats.streamed_files.raw_rows",
        lambda path, own, *more: kept.extend(own) or raw_rows(path, own, *more),
    )
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read(tmp_path / "train.jsonl", 50)["train"]) == len(kept) == 50
    assert {tuple(row) for row in kept} == {("text", "label")}


def test_a_key_that_many_rows_leave_out_is_null_there(tmp_path: Path, read: Any) -> None:
    folder = tmp_path / "shards"
    for number in range(4):
        rows = [{**row, **({"text_pair": "p"} if number == 2 else {})} for row in make_rows(10, name=f"{number}-")]
        write(folder / f"train-0000{number}-of-00004.jsonl", rows)
    other = [{**row, "text_pair": "p"} for row in make_rows(4)]
    splits = read(
        folder, 40, select=str(write(tmp_path / "s.jsonl", other)), test=str(write(tmp_path / "t.jsonl", other))
    )
    pairs = splits["train"].table["text_pair"].to_pylist()
    assert [pair for pair, text in zip(pairs, texts(splits["train"]), strict=True) if " 2-" in text] == ["p"] * 10
    assert Counter(pairs) == {None: 30, "p": 10}


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["", "  ", "\r"]), st.text(max_size=200).map(lambda text: json.dumps({"text": text}))
        ),
        min_size=1,
    ),
    st.booleans(),
    st.booleans(),
)
def test_each_line_begins_in_one_piece_wherever_a_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], marked: bool, ended: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(BYTE_ORDER_MARK * marked + ("\n".join(lines) + "\n" * ended).encode())
    if not path.stat().st_size:
        return
    file = StreamedLines(path, frozenset(["text"]), {})
    chunks = [chunk for piece in range(len(file.sizes)) for chunk in file.read(piece, 3)]
    raw = file.raw(chunks)
    expected = [(number, json.loads(line)) for number, line in enumerate(lines, start=1) if line.strip()]
    assert raw.fetch("text").to_pylist() == [row["text"] for _, row in expected]
    assert [raw.lines[row] for row in range(raw.num_rows)] == [number for number, _ in expected] if raw.lines else True


def test_malformed_lines_are_told_by_their_lines_and_values(tmp_path: Path, read: Any) -> None:
    lines = [json.dumps(row).encode() for row in make_rows(200)]
    lines[2] = b""
    lines[40] = b'{"text": "cut off'
    lines[41] = b"17"
    lines[100] = b'{"text": "a", "text": "b"}'
    lines[150] = '{"text": "café"}'.encode("latin-1")
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as caught:
        read(tmp_path / "train.jsonl", 200)
    found = {str(problem.where).rpartition(":")[2]: problem.what for problem in caught.value.problems}
    assert found["41"].startswith("1 line not valid JSON (line 41: ")
    assert found["42"] == '1 line not a JSON object (line 42: "17")'
    assert found["101"] == '1 line with a key that stands twice (line 101: "text")'
    assert found["151"] == "1 line not UTF-8 (line 151: byte 14 is 0xe9)"
    assert all(problem.remedy for problem in caught.value.problems)


def test_a_file_of_nothing_but_malformed_lines_is_not_read_to_its_end(
    tmp_path: Path, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text("no json\n" * 20_000)
    with pytest.raises(DataError, match=r"100 lines not valid JSON \(line 1: "):
        read(tmp_path / "train.jsonl", 100)


@pytest.mark.parametrize("cut", [True, False])
def test_a_broken_parquet_file_is_refused(tmp_path: Path, read: Any, cut: bool) -> None:
    file = write(tmp_path / "train.parquet", make_rows(500))
    data = file.read_bytes()
    file.write_bytes(data[:-100] if cut else data[:4] + b"\xff" * 3000 + data[3004:])
    with pytest.raises(DataError, match=r"train.parquet: the file is not whole Parquet: cut off, damaged"):
        read(file, 500)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("train.csv", r"\.csv cannot be read in pieces; \.jsonl, \.parquet, \.arrow can"),
        ("train.json", r"\.json cannot be read in pieces"),
        ("none.jsonl", "there is no such file"),
        ("empty.jsonl", "is empty"),
        ("blank.jsonl", "there are no examples"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path: Path, read: Any, name: str, what: str) -> None:
    (tmp_path / "train.csv").write_text("text,label\nx,1\n")
    (tmp_path / "train.json").write_text('[{"text": "x", "label": 1}]')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=what) as caught:
        read(tmp_path / name, 5)
    assert caught.value.problems[0].remedy


def test_a_column_of_the_wrong_name_is_told_with_those_there_are(tmp_path: Path, read: Any) -> None:
    for suffix in FORMATS:
        file = write(tmp_path / f"train.{suffix}", [{"id": 1, "txt": "a", "label": 0}] * 9)
        with pytest.raises(DataError, match="no column text; the columns are id, txt, label"):
            read(file, 5)


@pytest.mark.parametrize("overrides", [["target.limit.train=40"], ["train.steps=5"]])
def test_missing_splits_are_cut_from_more_so_that_train_is_whole(
    write_recipe: Any, tmp_path: Path, overrides: list[str]
) -> None:
    words = ("".join(letters) for letters in np.random.default_rng(0).choice(list("abcdefgh"), (5000, 12)))
    file = write(
        tmp_path / "train.jsonl", [{"text": word, "label": f"{number % 2}"} for number, word in enumerate(words)]
    )
    target = {
        "task": "text-classification",
        "data": {"train": str(file), "stream": True},
        "options": {"max_length": 32},
    }
    inputs = read_inputs(
        orchestrator.load_recipe(write_recipe(target=target), [*overrides, "train.global_batch_size=8"])
    )
    assert {name: len(split) for name, split in inputs.examples.items()} == {"train": 40, "select": 5, "test": 5}
    assert not [warning for warning in inputs.warnings if "seen again" in warning.what]


def test_data_that_are_too_few_for_the_steps_are_told(write_recipe: Any, tmp_path: Path, small_data: Path) -> None:
    target = {
        "task": "text-classification",
        "data": {"path": str(small_data), "stream": True},
        "options": {"max_length": 32},
    }
    recipe = orchestrator.load_recipe(write_recipe(target=target, train={"steps": 9}))
    (warning,) = [problem for problem in read_inputs(recipe).warnings if "seen again" in problem.what]
    assert warning.what == "there are 60 training examples, and 9 steps of 8 take 72: some are seen again"
    assert not warning.fatal


def test_readings_take_turns_and_the_next_one_takes_the_place_of_one_that_ends() -> None:
    begun: list[int] = []

    def reading(number: int, length: int) -> Iterator[str]:
        begun.append(number)
        for item in range(length):
            yield f"{number}{item}"

    turns = round_robin((reading(number, length) for number, length in enumerate([1, 3, 0, 2])), 2)
    assert next(turns) == "00"
    assert begun == [0]
    assert list(turns) == ["10", "30", "11", "31", "12"]


def shards(
    number: int, size: int, features: datasets.Features | None, read: list[int], fail_at: int | None = None
) -> datasets.IterableDataset:
    """A split of so many shards; `read` takes up how many rows of it were asked for."""

    def generate(names: list[str]) -> Iterator[dict[str, Any]]:
        for name in names:
            for row in range(size):
                read[0] += 1
                if read[0] == fail_at:
                    raise OSError("the connection was lost")
                yield {"sentence": f"{name}-{row}", "label": row % 2, "other": row}

    names = {"names": [f"s{index}" for index in range(number)]}
    return datasets.IterableDataset.from_generator(generate, features=features, gen_kwargs=names)


FEATURES = datasets.Features(
    {
        "sentence": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["no", "yes"]),
        "other": datasets.Value("int64"),
    }
)


@pytest.fixture
def stream_hub(monkeypatch: pytest.MonkeyPatch, columns: Any) -> Callable[..., dict[str, Examples]]:
    """Return the target section of a Hub data set that streams these splits."""

    def stream_hub(splits: dict[str, Any], limit: int, **data: Any) -> dict[str, Examples]:
        def load(**options: Any) -> Any:
            assert options.pop("streaming") is True
            every = datasets.IterableDatasetDict(splits)
            return every[options["split"]] if options["split"] else every

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(hub, "_reaches", lambda endpoint: True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        target = {"task": "t", "data": {"path": "some/data", "stream": True, **data}, "limit": {"train": limit}}
        return open_splits(
            Recipe.model_validate({"name": "test", "source": {"model": "some/model"}, "target": target}), columns
        )

    return stream_hub


@pytest.mark.parametrize("features", [FEATURES, None])
def test_of_a_hub_data_set_the_beginnings_of_its_shards_are_read(stream_hub: Any, features: Any) -> None:
    read, others = [0], [0]
    splits = {"train": shards(20, 1000, features, read), "validation": shards(1, 7, features, others)}
    splits["test"] = splits["validation"]
    found = stream_hub(splits, 80)
    train = found["train"]
    assert len(train) == 80
    assert read[0] < 300
    assert Counter(text.split("-")[0] for text in texts(train)).most_common()[-1][1] == 10
    for place, text in enumerate(texts(train)):
        shard, row = text.removeprefix("s").split("-")
        assert train.where(place) == f"some/data train shard {shard} row {row}"
    assert texts(found["select"]) == [f"s0-{row}" for row in range(7)]
    assert found["select"].where(2) == "some/data validation row 2"
    assert train.names.get("label") == (("no", "yes") if features else None)


def test_a_hub_data_set_of_one_shard_can_be_read_to_its_end(stream_hub: Any) -> None:
    splits = {name: shards(1, 30, FEATURES, [0]) for name in ("a", "b", "c")}
    found = stream_hub(splits, 100, train="a", select="b", test="c")
    assert list(found) == ["train", "select", "test"]
    assert texts(found["train"]) == [f"s0-{row}" for row in range(30)]


def test_a_hub_stream_that_breaks_off_is_told(stream_hub: Any) -> None:
    splits = {name: shards(1, 500, FEATURES, [0], fail_at=100) for name in ("train", "validation", "test")}
    with pytest.raises(DataError, match="the data set some/data cannot be loaded: the connection was lost"):
        stream_hub(splits, 300)


def test_tables_that_were_taken_for_other_types_are_put_together() -> None:
    tables = [pa.table({"text": ["a"], "label": [1]}), pa.table({"text": ["b"], "label": pa.nulls(1)})]
    file = StreamedTables("x", None, [0, 1], [1.0, 1.0], lambda piece, turn: iter([tables[piece]]))
    raw = file.raw([chunk for piece in (0, 1) for chunk in file.read(piece, 9)])
    assert raw.fetch("label").to_pylist() == [1, None]
