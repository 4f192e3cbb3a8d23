"""The data formats, by suffix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from orchestrator.data.formats.arrow_files import read_arrow, read_parquet
from orchestrator.data.formats.csv_files import read_csv, read_tsv
from orchestrator.data.formats.json_files import read_json, read_jsonl
from orchestrator.data.formats.raw import RawFile
from orchestrator.data.messages import show_names
from orchestrator.errors import DataError, Problem, nearest
from orchestrator.recipe.paths import show_path

READERS: Mapping[str, Callable[[Path], RawFile]] = MappingProxyType(
    {
        ".jsonl": read_jsonl,
        ".json": read_json,
        ".csv": read_csv,
        ".tsv": read_tsv,
        ".parquet": read_parquet,
        ".arrow": read_arrow,
    }
)


def read_file(path: Path) -> RawFile:
    """Read a data file in the format that its suffix names.

    Raises:
        DataError: the file is missing, of an unknown format, or damaged; see the readers.
    """
    if not path.is_file():
        raise DataError(missing_path(path))
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        what = f"the suffix {path.suffix or '(none)'} is not a data format; those are {', '.join(READERS)}"
        raise DataError(Problem(what, show_path(path), "convert the file to one of them (unpack it, if it is packed)"))
    return replace(reader(path), folder=path.parent)


def missing_path(path: Path) -> Problem:
    """Return the problem of a file or folder that is not there, with the nearest name that is."""
    if path.is_dir():
        return Problem("this is a folder, not a file", show_path(path), "name the files in it, or the folder alone")
    folder = next((parent for parent in path.parents if parent.is_dir()), path.parent)
    if folder != path.parent:
        what = f"there is no folder {show_path(path.parent)}"
        return Problem(what, show_path(path), "check the path; it is relative to the recipe's folder")
    found = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    close = nearest(path.name, found)
    what = f"there is no such file; the folder holds {show_names(found) or 'nothing'}"
    remedy = f"did you mean {close}?" if close else "check the path; it is relative to the recipe's folder"
    return Problem(what, show_path(path), remedy)
