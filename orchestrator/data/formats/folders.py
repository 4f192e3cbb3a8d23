"""Which files of a folder are which split."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from orchestrator.data.formats.image_folders import holds_pictures
from orchestrator.data.formats.readers import READERS
from orchestrator.data.messages import show_names
from orchestrator.errors import DataError, Problem
from orchestrator.recipe.paths import show_path

SPLIT_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"train": ("train",), "select": ("select", "validation", "valid", "val", "dev"), "test": ("test",)}
)
"""What data sets call each split."""

_NOT_DATA = frozenset({"labels.json", "state.json", "dataset_info.json", "dataset_dict.json"})
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})")


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split: `train.*` or a subfolder `train`; `select`/`validation`/`dev` and `test` alike.

    Shards (`train-00000-of-00002.parquet`) make one split. A folder that `datasets` saved one split into is all train.
    A split of pictures is a folder with a subfolder for each class; one that is no split itself is all train.

    Raises:
        DataError: no training data, two candidates for one split, a shard that is missing.
    """
    if not _data_files(folder) and (folder / "data").is_dir() and not _has_splits(folder):
        folder = folder / "data"
    if (folder / "state.json").is_file():
        return {"train": [path for path in _data_files(folder) if path.suffix == ".arrow"]}
    splits = {split: find_split(folder, words) for split, words in SPLIT_WORDS.items()}
    if not any(splits.values()) and not _data_files(folder) and holds_pictures(folder):
        return {"train": [folder]}
    if not splits["train"]:
        what = f"the folder has no training data; it holds {_contents(folder)}"
        remedy = "name a file train.jsonl (or .csv, .parquet, ...), or write `data: {train: FILE, test: FILE}`"
        if holds_pictures(folder):
            remedy = "put the folders of the classes into a folder named train, or write `data: {train: FOLDER}`"
        raise DataError(Problem(what, show_path(folder), remedy))
    return {split: paths for split, paths in splits.items() if paths}


def find_split(folder: Path, words: Sequence[str]) -> list[Path]:
    """Return the files (or the folder of pictures) of the split with one of these names; empty when there is none."""
    candidates: dict[tuple[str, str], list[Path]] = {}
    for path in _data_files(folder):
        stem = _stem(path)
        if stem.lower() in words:
            candidates.setdefault((stem, path.suffix), []).append(path)
    for entry in _subfolders(folder):
        if entry.name.lower() in words:
            for path in folder_files(entry):
                candidates.setdefault((entry.name + "/", ""), []).append(path)
    if len(candidates) > 1:
        what = f"there are {len(candidates)} candidates for one split: {show_names(a + b for a, b in candidates)}"
        remedy = "keep one of them, or write `data: {train: FILE, test: FILE}`"
        raise DataError(Problem(what, show_path(folder), remedy))
    paths = next(iter(candidates.values()), [])
    _check_shards(paths)
    return paths


def folder_files(folder: Path) -> list[Path]:
    """Return all data files of one split's folder, of one format; the folder itself where it holds only pictures.

    Raises:
        DataError: there are none, or of several formats.
    """
    paths = _data_files(folder)
    if not paths and holds_pictures(folder):
        return [folder]
    suffixes = {path.suffix for path in paths}
    if len(suffixes) != 1:
        what = "the folder has no data files" if not paths else f"the folder mixes {', '.join(sorted(suffixes))} files"
        remedy = f"put files of one format there ({', '.join(READERS)}), or a folder of pictures for each class"
        raise DataError(Problem(what, show_path(folder), remedy))
    _check_shards(paths)
    return paths


def find_label_list(path: Path) -> tuple[str, ...] | None:
    """Return class names from a `labels.json` (a list of names) beside a data file, or beside its split's folder.

    A `labels.json` that holds something else is none of ours.
    """
    words = [word for every in SPLIT_WORDS.values() for word in every]
    folders = [path.parent, path.parent.parent] if path.parent.name.lower() in words else [path.parent]
    for folder in folders:
        file = folder / "labels.json"
        if file.is_file():
            try:
                names = json.loads(file.read_bytes())
            except ValueError:
                what = "the label names beside the data are not valid JSON"
                remedy = 'write a list of names, such as ["negative", "positive"], or remove the file'
                raise DataError(Problem(what, show_path(file), remedy)) from None
            if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return None


def _data_files(folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in READERS)
    return [entry for entry in entries if entry.name not in _NOT_DATA and entry.is_file()]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir())


def _has_splits(folder: Path) -> bool:
    words = {word for every in SPLIT_WORDS.values() for word in every}
    return any(entry.name.lower() in words for entry in _subfolders(folder))


def _stem(path: Path) -> str:
    shard = _SHARD.fullmatch(path.stem)
    return shard["stem"] if shard else path.stem


def _check_shards(paths: Sequence[Path]) -> None:
    shards = [match for path in paths if (match := _SHARD.fullmatch(path.stem))]
    for total in {shard["total"] for shard in shards}:
        present = {int(shard["number"]) for shard in shards if shard["total"] == total}
        missing = sorted(set(range(int(total))) - present)
        if missing:
            what = f"{len(missing)} of the {int(total)} shards are missing, the first is number {missing[0]:05d}"
            raise DataError(Problem(what, show_path(paths[0].parent), "download or copy the missing files"))


def _contents(folder: Path) -> str:
    return show_names(sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())) or "nothing"
