"""Every format gives the same table, and every damaged file is refused with the right place."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.data import open_file, open_files
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.label import LabelField
from orchestrator.data.fields.text import TextField
from orchestrator.data.formats.readers import read_file
from orchestrator.errors import DataError

TEXT = Column("text", TextField())
LABEL = Column("label", LabelField())
ROWS = [
    {"text": "a, b", "label": "yes"},
    {"text": 'two\nlines and a "quote"', "label": "no"},
    {"text": "ünïcödé \u2028 \U0001f600", "label": "yes"},
]


def write_as(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows if path.stem == "list" else {"data": rows}), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        opener = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
        with opener(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


NAMES = ["a.jsonl", "list.json", "object.json", "a.csv", "a.tsv", "a.parquet", "file.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", NAMES)
def test_all_formats_give_the_same_table_and_fingerprint(tmp_path: Path, name: str) -> None:
    expected = open_files([write_as(tmp_path / "expected.jsonl", ROWS)], [TEXT, LABEL], {})
    examples = open_files([write_as(tmp_path / name, ROWS)], [TEXT, LABEL], {})
    assert examples.table.to_pylist() == ROWS
    assert examples.table.schema == expected.table.schema
    assert examples.fingerprint == expected.fingerprint


def test_a_changed_value_a_changed_order_and_a_null_change_the_fingerprint(tmp_path: Path) -> None:
    examples = open_files([write_as(tmp_path / "a.jsonl", ROWS)], [TEXT, LABEL], {})
    other = open_files([write_as(tmp_path / "b.jsonl", [{**ROWS[0], "text": "a, c"}, *ROWS[1:]])], [TEXT, LABEL], {})
    nulled = open_files([write_as(tmp_path / "c.jsonl", [{**ROWS[0], "label": ""}, *ROWS[1:]])], [TEXT, LABEL], {})
    prints = {e.fingerprint for e in (examples, other, nulled, examples.take([1, 0, 2]), examples.take([0, 1]))}
    assert len(prints) == 5
    assert examples.take([1, 0, 2]).take([1, 0, 2]).fingerprint == examples.fingerprint


def test_text_that_moves_from_one_row_to_the_next_changes_the_fingerprint(tmp_path: Path) -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("", "abc")]
    paths = [write_as(tmp_path / f"{n}.jsonl", [{"text": text} for text in pair]) for n, pair in enumerate(pairs)]
    assert len({open_files([path], [TEXT], {}).fingerprint for path in paths}) == 3


def test_chunks_and_slices_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    rows = [{"text": str(n), "label": [str(m) for m in range(n % 3)]} for n in range(20)]
    whole = open_files([write_as(tmp_path / "a.jsonl", rows)], [TEXT, LABEL], {})
    parts = [write_as(tmp_path / f"{n}.jsonl", rows[n * 7 : n * 7 + 7]) for n in range(3)]
    assert open_files(parts, [TEXT, LABEL], {}).fingerprint == whole.fingerprint
    assert (
        whole.take(range(5, 9)).fingerprint
        == open_files([write_as(tmp_path / "slice.jsonl", rows[5:9])], [TEXT, LABEL], {}).fingerprint
    )


def test_rows_know_their_line_or_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n\n{"text": "y", "label": 2}\n')
    # A quoted value over three lines: the row after it begins on line 5.
    (tmp_path / "a.csv").write_text('text,label\n"x\nx\nx",1\ny,2\n')
    write_as(tmp_path / "a.parquet", ROWS)
    jsonl, table = (open_files([tmp_path / name], [TEXT, LABEL], {}) for name in ("a.jsonl", "a.csv"))
    assert [jsonl.where(0), jsonl.where(1)] == ["a.jsonl:1", "a.jsonl:3"]
    assert [table.where(0), table.where(1)] == ["a.csv:2", "a.csv:5"]
    both = open_files([tmp_path / "a.jsonl", tmp_path / "a.csv"], [TEXT, Column("label", LabelField(), False)][:1], {})
    assert both.take([3, 0]).where(0) == "a.csv:5"
    assert open_files([tmp_path / "a.parquet"], [TEXT], {}).where(2) == "a.parquet row 2"


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\r\n')
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\r\nx,1\r\n")
    assert open_files([tmp_path / "a.jsonl"], [TEXT], {}).table["text"].to_pylist() == ["x", "y"]
    assert open_files([tmp_path / "a.csv"], [TEXT, LABEL], {}).table.to_pylist() == [{"text": "x", "label": 1}]


def test_values_of_csv_are_text_where_they_are_no_numbers_and_an_empty_label_is_null(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nNA,1\nnull,\n2024-01-01,007\n")
    examples = open_files([tmp_path / "a.csv"], [TEXT, LABEL], {})
    assert examples.table["text"].to_pylist() == ["NA", "null", "2024-01-01"]
    assert examples.table["label"].to_pylist() == ["1", None, "007"]


def test_a_tsv_with_loose_quotes_is_read_with_quotes_as_characters(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"good" film\t1\n5" disc\t0\n')
    assert open_files([tmp_path / "a.tsv"], [TEXT], {}).table["text"].to_pylist() == ['"good" film', '5" disc']


def test_a_csv_field_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    before = 131_072
    csv.field_size_limit(before)
    (tmp_path / "a.csv").write_text(f"text,label\n{'x' * 200_000},1\n")
    assert len(open_files([tmp_path / "a.csv"], [TEXT], {}).table["text"][0].as_py()) == 200_000
    assert csv.field_size_limit() == before


def test_what_is_odd_in_a_column_nobody_asked_for_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "id": 1, "n": {"a": 1}}\n{"text": "y", "id": "b", "n": {"a": 2}}\n')
    assert open_files([path], [TEXT], {}).table.column_names == ["text"]
    assert open_file(path).table.to_pylist() == [{"text": "x", "n": {"a": 1}}, {"text": "y", "n": {"a": 2}}]


@pytest.mark.parametrize(
    ("values", "type_", "expected"),
    [
        ([1, 2], pa.int64(), [1, 2]),
        ([1, 2.5, None], pa.float64(), [1.0, 2.5, None]),
        ([True, False], pa.string(), ["true", "false"]),
        ([["a"], [], None], pa.list_(pa.string()), [["a"], [], None]),
        ([[1, 2], [3]], pa.list_(pa.int64()), [[1, 2], [3]]),
        ([None, None], pa.string(), [None, None]),
    ],
)
def test_labels_of_json_take_one_plain_type(tmp_path: Path, values: list[Any], type_: Any, expected: list[Any]) -> None:
    path = write_as(tmp_path / "a.jsonl", [])
    path.write_text("".join(json.dumps({"label": value}) + "\n" for value in values))
    column = open_files([path], [LABEL], {}).table["label"]
    assert column.type == type_
    assert column.to_pylist() == expected


GOOD = b'{"text": "x", "label": "a"}\n'
UTF16 = "text,label\nx,1\n".encode("utf-16")
WRONG: list[tuple[str, bytes, str, str]] = [
    ("a.jsonl", b"", "a.jsonl", "0 bytes"),
    ("a.parquet", b"", "a.parquet", "0 bytes"),
    ("a.csv", b"text,label\n", "a.csv", "no examples in the data"),
    ("a.jsonl", b"\n\n", "a.jsonl", "no examples in the data"),
    ("a.csv", b"\n\n", "a.csv", "blank lines only"),
    ("a.jsonl", GOOD + b'{"text": "caf\xe9", "label": "a"}\n', "a.jsonl:2", "byte 14 of this line is 0xe9"),
    ("a.csv", UTF16, "a.csv", "UTF-16"),
    ("a.jsonl", GOOD + b'{"text": "x\x00", "label": "a"}\n', "a.jsonl:2", "1 NUL bytes"),
    ("a.jsonl", GOOD + b'{"text": "x"\n' + GOOD + b"{text: 1}\n", "a.jsonl:2", "2 lines not valid JSON"),
    ("a.jsonl", GOOD + b'["x", "a"]\n', "a.jsonl:2", "not a JSON object"),
    ("a.jsonl", GOOD + b'{"text": "x", "label": "a", "text": "y"}\n', "a.jsonl:2", '"text"'),
    ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", "a.jsonl:2", "nested too deeply"),
    ("a.jsonl", GOOD + b'{"text": 1, "label": "a"}\n', "a.jsonl:2", "several types"),
    ("a.jsonl", b'{"text": "\\ud800", "label": "a"}\n', "a.jsonl:1", "surrogate"),
    ("a.jsonl", b'{"text": "x", "label": 99999999999999999999}\n', "a.jsonl:1", "64 bits"),
    ("a.jsonl", b'{"text": {"en": "x"}, "label": 1}\n', "a.jsonl", "nested objects"),
    ("a.jsonl", b'{"text": 12, "label": 1}\n', "a.jsonl", "whole numbers"),
    ("a.jsonl", b'{"txt": "x", "label": 1}\n', "a.jsonl", "no column text; the columns are txt, label"),
    ("a.json", b'{"text": ["x"], "label": ["a"]}', "a.json", "not a list of objects"),
    ("a.json", b'[{"text": "x"},\n {"text": }]', "a.json:2", "not valid JSON"),
    ("a.json", GOOD + GOOD, "a.json:2", "not valid JSON"),
    ("a.json", b'[{"text": "x"}, 3]', "a.json row 1", "not an object"),
    ("a.json", b'[{"text": "x", "text": "y"}]', "a.json row 0", "twice"),
    ("a.csv", b"text,label\nx,1\ny\n\nz,1,2\n", "a.csv:3", "2 lines with another number of fields"),
    ("a.csv", b'text,label\nx,1\n"never closed,1\n', "a.csv:3", "quotes"),
    ("a.csv", b"text,label,text\nx,1,y\n", "a.csv:1", "more than once"),
    ("a.csv", b"text;label\nx;1\n", "a.csv:1", "semicolons"),
    ("a.parquet", b"PAR1 this is no parquet", "a.parquet", "not whole Parquet"),
    ("a.arrow", b"ARROW1 this is no arrow", "a.arrow", "not whole Arrow"),
    ("a.txt", b"x", "a.txt", "not a data format"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=[f"{wrong[0]}-{wrong[3][:20]}" for wrong in WRONG])
def test_a_wrong_file_is_refused_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, bytes, str, str]
) -> None:
    name, contents, where, what = wrong
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError) as caught:
        open_files([tmp_path / name], [TEXT, LABEL], {})
    fitting = [problem for problem in caught.value.problems if what in problem.what]
    assert fitting, str(caught.value)
    assert fitting[0].where == where
    assert fitting[0].remedy


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_a_binary_file_cut_off_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path = write_as(tmp_path / name, ROWS * 50)
    data = path.read_bytes()
    for size in (1, len(data) // 3, len(data) // 2, len(data) - 12):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"not whole|0 bytes"):
            open_files([path], [TEXT, LABEL], {})


def test_a_missing_file_is_named_with_the_nearest_that_is_there(tmp_path: Path) -> None:
    write_as(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError) as caught:
        read_file(tmp_path / "trian.jsonl")
    assert caught.value.problems[0].remedy == "did you mean train.jsonl?"


def test_parquet_with_a_column_name_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="more than once"):
        read_file(tmp_path / "a.arrow")


def test_terminal_escapes_in_data_do_not_reach_the_message(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"te\x1b[31mxt": 1}) + "\n" + json.dumps("\x1b]0;title\x07") + "\n")
    with pytest.raises(DataError) as caught:
        open_files([path], [TEXT], {})
    assert all(char.isprintable() or char == "\n" for char in str(caught.value))


anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(anything, anything), min_size=1))
def test_any_text_survives_json_lines(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "extra": extra}, ensure_ascii=False) for text, extra in rows]
    path.write_bytes("\n".join(lines).encode())
    examples = open_files([path], [TEXT, Column("extra", TextField())], {})
    assert list(zip(*(examples.table[name].to_pylist() for name in ("text", "extra")), strict=True)) == rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(anything, anything), min_size=1), separator=st.sampled_from([",", "\t"]))
def test_any_text_survives_csv_and_tsv(tmp_path: Path, rows: list[tuple[str, str]], separator: str) -> None:
    path = tmp_path / ("a.csv" if separator == "," else "a.tsv")
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=separator).writerows([("text", "extra"), *rows])
    path.write_bytes(buffer.getvalue().encode())
    examples = open_files([path], [TEXT, Column("extra", TextField())], {})
    assert list(zip(*(examples.table[name].to_pylist() for name in ("text", "extra")), strict=True)) == rows


def test_a_hundred_thousand_rows_are_read_in_their_order(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([{"text": f"a short message number {n}", "label": n % 7} for n in range(100_000)])
    examples = open_files([path], [TEXT, LABEL], {})
    assert np.array_equal(examples.rows, np.arange(100_000))
