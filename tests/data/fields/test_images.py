"""Columns of pictures: where they come from, what is refused, what is the same picture, and what is shown of them."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.data import (
    Column,
    Examples,
    encode_labels,
    find_label_names,
    open_file,
    open_files,
    open_splits,
    open_values,
    rename_columns,
    without_bytes,
)
from orchestrator.data.checks import check_class_labels
from orchestrator.data.fields import image_checks
from orchestrator.data.fields.image import ImageField
from orchestrator.data.fields.image_checks import check_images
from orchestrator.data.fields.images import digests_of, read_picture
from orchestrator.data.fields.label import LabelField
from orchestrator.data.fields.labels import declares_names
from orchestrator.data.formats import hub
from orchestrator.data.overlap import check_overlap
from orchestrator.data.splits import cut_missing_splits
from orchestrator.errors import DataError, Problem
from orchestrator.recipe.schema import Split
from orchestrator.training.prepare import without_content

COLUMNS = (Column("image", ImageField(), aliases=("file_name",)), Column("label", LabelField("classes")))


def picture_bytes(seed: int, mode: str = "RGB", format_: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format_)
    return stream.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write bytes, or a new picture, into a file of the test's folder."""

    def write_file(name: str, data: bytes | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes(sum(name.encode())) if data is None else data)
        return path

    return write_file


@pytest.fixture
def classes(write: Callable[..., Path], tmp_path: Path) -> Path:
    """Folders of classes, in two splits."""
    for name in (
        "train/cat/1.png",
        "train/cat/deep/2.JPG",
        "train/dog/1.png",
        "test/cat/3.png",
        "test/dog/.hidden.png",
    ):
        write(name)
    write("test/dog/4.png")
    write("train/cat/notes.txt", b"not a picture")
    return tmp_path


def contents(examples: Examples) -> list[bytes]:
    values = examples.table["image"].to_pylist()
    return [read_picture(value, examples.where(row)) for row, value in enumerate(values)]


def read(path: Path) -> Examples:
    return open_files([path], COLUMNS, {})


def problems_of(examples: Examples) -> list[Problem]:
    return check_images({"train": examples}, "image")


def test_folders_of_classes_are_splits_with_labels(classes: Path, make_recipe: Any) -> None:
    splits = open_splits(make_recipe(classes), COLUMNS)
    assert list(splits) == ["train", "test"]
    train = splits["train"]
    assert train.table["label"].to_pylist() == ["cat", "cat", "dog"]
    assert [train.where(row) for row in range(3)] == [
        str(classes / "train" / name) for name in ("cat/1.png", "cat/deep/2.JPG", "dog/1.png")
    ]
    assert contents(train)[2] == (classes / "train/dog/1.png").read_bytes()
    assert splits["test"].table["label"].to_pylist() == ["cat", "dog"]


def test_a_folder_of_classes_that_is_no_split_is_all_train(classes: Path, make_recipe: Any) -> None:
    assert list(open_splits(make_recipe(classes / "train"), COLUMNS)) == ["train"]
    written_out = {"train": str(classes / "train"), "test": str(classes / "test")}
    assert list(open_splits(make_recipe(written_out), COLUMNS)) == ["train", "test"]


@pytest.mark.parametrize(
    "names",
    [["1.0", "2.0"], ["1", "1.0"], ["007", "7"], ["1e3", "2"], ["1", "2"], ["0", "00", "1", "10"], ["01", "-1"]],
)
def test_names_of_class_folders_stay_as_written_also_where_they_are_numbers(
    names: list[str], make_recipe: Any, write: Any, tmp_path: Path
) -> None:
    for split, number in (("train", 0), ("train", 1), ("test", 2)):
        for name in names:
            write(f"{split}/{name}/{number}.png")
    splits = open_splits(make_recipe(tmp_path), COLUMNS)
    assert set(splits["train"].table["label"].to_pylist()) == set(names)
    found = find_label_names(splits, "label", None)
    assert sorted(found) == sorted(names)
    for examples in splits.values():
        codes = encode_labels(examples, "label", found, declares_names(splits, "label", None))
        assert [found[code] for code in codes] == examples.table["label"].to_pylist()
    assert check_class_labels(splits, "label") == []


@pytest.mark.parametrize("label", [1, "1", "1.0", 1.0])
def test_numbers_in_another_split_are_the_class_folders_of_their_values(
    label: Any, make_recipe: Any, write: Any, tmp_path: Path
) -> None:
    for name in ("1.0/a.png", "1.0/b.png", "2.0/a.png", "2.0/b.png", "c.png"):
        write(f"data/{name}" if "/" in name else name)
    (tmp_path / "select.jsonl").write_text(json.dumps({"image": "c.png", "label": label}))
    data = {"train": str(tmp_path / "data"), "select": str(tmp_path / "select.jsonl")}
    splits = open_splits(make_recipe(data), COLUMNS)
    assert find_label_names(splits, "label", None) == ("1.0", "2.0")
    assert check_class_labels(splits, "label") == []
    assert encode_labels(splits["select"], "label", ("1.0", "2.0")).tolist() == [0]


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("train/loose.png", None, r"1 pictures are next to the folders of the classes.*loose\.png"),
        ("train/bird/readme.txt", b"x", "1 of 3 folders of classes have no pictures: bird"),
    ],
)
def test_folders_of_classes_that_are_unclear_are_refused(
    classes: Path, make_recipe: Any, write: Any, name: str, data: bytes | None, what: str
) -> None:
    write(name, data)
    with pytest.raises(DataError, match=what):
        open_splits(make_recipe(classes), COLUMNS)


def test_pictures_without_folders_of_classes_cannot_be_trained_on(classes: Path, make_recipe: Any) -> None:
    with pytest.raises(DataError, match="holds 1 pictures, but no folder for each class"):
        open_splits(make_recipe(classes / "test" / "cat"), COLUMNS)


def test_data_files_go_before_pictures_that_lie_beside_them(classes: Path, make_recipe: Any, write: Any) -> None:
    rows = [{"file_name": "cat/1.png", "label": "a"}, {"file_name": "cat/deep/2.JPG", "label": "b"}]
    write("train/metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    train = open_splits(make_recipe(classes), COLUMNS)["train"]
    assert train.table["label"].to_pylist() == ["a", "b"]
    assert contents(train)[0] == (classes / "train/cat/1.png").read_bytes()


@pytest.mark.parametrize("form", ["binary", "large", "struct", "struct of both", "paths"])
def test_every_form_of_a_column_gives_the_same_pictures(form: str, write: Any, tmp_path: Path) -> None:
    paths = ["a.png", "b.png", None]
    data = [write(path).read_bytes() if path else None for path in paths]
    column = {
        "binary": pa.array(data, pa.binary()),
        "large": pa.array(data, pa.large_binary()),
        "struct": pa.array([{"bytes": item} if item else None for item in data]),
        "struct of both": pa.array(
            [{"bytes": data[0], "path": "elsewhere.png"}, {"bytes": None, "path": "b.png"}, None]
        ),
        "paths": pa.array(paths),
    }[form]
    pq.write_table(pa.table({"image": column, "label": [0, 1, 1]}), tmp_path / "train.parquet")
    train = read(tmp_path / "train.parquet")
    assert contents(train.take([0, 1])) == data[:2]
    (missing,) = problems_of(train)
    assert missing.what.startswith("image is missing (null) in 1 of 3 rows")
    pq.write_table(pa.table({"image": pa.array(data), "label": [0, 1, 1]}), tmp_path / "plain.parquet")
    # What is the same to look at is the same data, however it is stored.
    assert train.fingerprint == read(tmp_path / "plain.parquet").fingerprint


def test_another_picture_is_other_data(write: Any) -> None:
    rows = write("train.jsonl", b'{"image": "a.png", "label": 1}\n')
    write("a.png", picture_bytes(1))
    before = read(rows).fingerprint
    write("a.png", picture_bytes(2))
    assert read(rows).fingerprint != before


def test_paths_in_csv_are_relative_to_the_file(write: Any) -> None:
    write("deep/pictures/a.png")
    (data,) = contents(read(write("deep/train.csv", b"image,label\npictures/a.png,x\n")))
    assert data == picture_bytes(sum(b"deep/pictures/a.png"))


def test_paths_that_leave_the_folder_and_lead_nowhere_are_refused_together(write: Any, tmp_path: Path) -> None:
    outside = write("outside.png")
    write("data/here.png")
    (tmp_path / "data" / "link.png").symlink_to(outside)
    (tmp_path / "data" / "fine.png").symlink_to(tmp_path / "data" / "here.png")
    paths = ["here.png", "fine.png", "../outside.png", str(outside), "link.png", "x/../../outside.png", "C:\\a.png"]
    paths += ["gone.png", "a\0.png", "https://example.org/a.png", "", "."]
    lines = "".join(json.dumps({"image": path, "label": "x"}) + "\n" for path in paths)
    train = read(write("data/train.jsonl", lines.encode()))
    found = {problem.what.partition(" in ")[0]: problem for problem in problems_of(train)}
    assert set(found) == {
        "image is missing (null)",
        "image leads out of the folder of the data",
        "image names a file that is not there",
        "image is an address on the network",
        "image names something that is no file",
    }
    leaving = found["image leads out of the folder of the data"]
    assert "in 5 of 12 rows" in leaving.what
    assert (leaving.where or "").endswith("train.jsonl:3")
    assert "2 of 12 rows" in found["image names a file that is not there"].what
    assert all(problem.fatal and problem.remedy for problem in found.values())


def test_a_column_that_holds_no_pictures_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [[1, 2], [3]], "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"holds neither pictures .* nor paths .* but list<"):
        read(tmp_path / "train.parquet")


def huge_png() -> bytes:
    """A few bytes that claim to be 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BROKEN = {
    "empty.png": (b"", "is empty (0 bytes)"),
    "text.png": (b"<svg></svg>", "is in none of the formats that are read"),
    "cut.png": (picture_bytes(0, size=(60, 60))[:2000], "is damaged or cut off"),
    "cut.jpg": (picture_bytes(0, format_="JPEG", size=(60, 60))[:2000], "is damaged or cut off"),
    "huge.png": (huge_png(), "has more than 89,478,485 pixels"),
}


def test_broken_pictures_are_refused_together_with_their_places(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (data, _) in BROKEN.items():
        write(f"train/a/{name}", data)
    write("train/a/fine.png")
    write("train/b/fine.png")
    train = read(tmp_path / "train")
    found = problems_of(train)
    assert all(problem.fatal for problem in found)
    for name, (_, what) in BROKEN.items():
        (problem,) = [problem for problem in found if str(tmp_path / "train" / "a" / name) in problem.what]
        assert f"image {what}" in problem.what
        assert " of 7 rows" in problem.what
    monkeypatch.setattr(image_checks, "decode", lambda *_, **__: pytest.fail("what was found before is kept"))
    assert problems_of(train) == found


def test_pictures_that_are_not_plain_rgb_are_counted_in_one_note(write: Any, tmp_path: Path) -> None:
    for number, mode in enumerate(("L", "L", "RGBA", "P", "I;16", "RGB")):
        data = picture_bytes(number, "L" if mode == "I;16" else mode)
        if mode == "I;16":
            stream = io.BytesIO()
            Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(stream, "PNG")
            data = stream.getvalue()
        write(f"train/a/{number}.png", data)
    write("train/b/cmyk.jpg", picture_bytes(9, "CMYK", "JPEG"))
    (note,) = problems_of(read(tmp_path / "train"))
    assert not note.fatal
    assert note.what.startswith("6 of 7 pictures are not plain RGB (2 grey, ")
    for kind in ("1 with transparency", "1 with a palette", "1 16 bit grey", "1 CMYK"):
        assert kind in note.what


def test_animated_pictures_are_said(write: Any, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = write("train/a/moving.gif", b"")
    frames[0].save(path, save_all=True, append_images=frames[1:])
    write("train/b/still.png")
    notes = problems_of(read(tmp_path / "train"))
    assert any("1 of 2 pictures have several frames" in note.what and not note.fatal for note in notes)


def test_the_same_picture_in_two_splits_or_with_two_labels_is_noticed(
    classes: Path, write: Any, make_recipe: Any
) -> None:
    copied = (classes / "train/cat/1.png").read_bytes()
    write("test/dog/copy.png", copied)
    write("train/dog/copy.png", copied)
    splits = open_splits(make_recipe(classes), COLUMNS)
    across, conflict = check_overlap(splits, COLUMNS[:1], "label")
    assert across.what.startswith("1 of 3 examples of test (33.3%) are also in train")
    assert "copy.png" in across.what
    assert conflict.what.startswith("1 pictures stand in train with two labels")
    assert not across.fatal and not conflict.fatal


def test_copies_stay_on_one_side_when_splits_are_cut(write: Any, tmp_path: Path) -> None:
    for number in range(40):
        write(f"train/{'ab'[number % 2]}/{number}.png", picture_bytes(number // 4))
    parts = cut_missing_splits({"train": read(tmp_path / "train")}, Split(select=0.3, test=0.3), "label", COLUMNS[:1])
    seen = [set(digests_of(part, "image").to_pylist()) for part in parts.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 10
    assert all(seen)


def test_a_picture_that_changes_after_opening_is_refused(write: Any, tmp_path: Path) -> None:
    write("train/a/1.png")
    write("train/b/1.png")
    train = read(tmp_path / "train")
    write("train/b/1.png", picture_bytes(99))
    with pytest.raises(DataError, match="changed after the data were opened"):
        contents(train)


def test_examples_in_words_hold_no_bytes(write: Any, tmp_path: Path) -> None:
    data = write("a.png").read_bytes()
    column = pa.array([{"bytes": data, "path": "a.png"}, {"bytes": data, "path": None}, None])
    pq.write_table(pa.table({"image": column, "label": [0, 1, 1]}), tmp_path / "train.parquet")
    train = read(tmp_path / "train.parquet")
    named = without_content(train, COLUMNS)
    assert named.table["image"].to_pylist() == ["a.png", f"{len(data):,} bytes", None]
    assert named.where(1) == train.where(1)
    assert len(pickle.dumps(named)) < 3000


def test_pictures_alone_are_a_column_of_paths(classes: Path) -> None:
    found = open_values(classes / "train", COLUMNS)
    assert found.table["image"].to_pylist() == ["cat/1.png", "cat/deep/2.JPG", "dog/1.png"]
    images = rename_columns(found, COLUMNS[:1], {})
    assert contents(images)[0] == (classes / "train/cat/1.png").read_bytes()
    (alone,) = open_values(classes / "train/cat/1.png", COLUMNS).table["image"].to_pylist()
    assert alone == "1.png"
    (classes / "nothing").mkdir()
    with pytest.raises(DataError, match="the folder holds no pictures"):
        open_values(classes / "nothing", COLUMNS)


def test_bytes_are_left_out_of_what_is_written_back(write: Any, tmp_path: Path) -> None:
    data = write("a.png").read_bytes()
    table = pa.table({"image": [data], "both": [{"bytes": data, "path": "a.png"}], "other": [{"x": 1}]})
    pq.write_table(table, tmp_path / "rows.parquet")
    given = open_file(tmp_path / "rows.parquet").table
    shown = {name: without_bytes(given[name]).to_pylist() for name in given.column_names}
    assert shown == {"image": [f"{len(data):,} bytes"], "both": ["a.png"], "other": [{"x": 1}]}


def test_pictures_of_the_hub_are_read_as_bytes_and_never_decoded_there(
    write: Any, make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(write("cached/a.png")), str(write("cached/b.png"))]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    embedded = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    monkeypatch.setattr(hub, "_reaches", lambda endpoint: True)
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_: pytest.fail("decoded"))
    for column in (paths, embedded):
        data = datasets.Dataset.from_dict({"img": column, "label": [0, 1]}, features=features)
        monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict({"train": data}))  # noqa: B023
        recipe = make_recipe("owner/pictures", columns={"image": "img"})
        train = open_splits(recipe, COLUMNS)["train"]
        assert contents(train) == [Path(path).read_bytes() for path in paths]
        assert train.names.get("label") == ("no", "yes")
