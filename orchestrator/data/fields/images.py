"""A column of pictures: their bytes, or the files that they lie in, and the hash of each one's content."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.examples import IMAGE, Examples, SourceFile
from orchestrator.data.messages import show_name, show_value
from orchestrator.data.threads import map_in_threads
from orchestrator.errors import DataError, Problem
from orchestrator.recipe.paths import path_exists, show_path

LARGEST_FILE = 2**30  # bytes; no picture that could be decoded comes near


@dataclass(frozen=True)
class Fault:
    """Why a path leads to no picture."""

    what: str
    """A clause to follow the column's name: `names a file that is not there`."""
    remedy: str


_LEAVES = Fault("leads out of the folder of the data", "copy the pictures into it, and name them relative to it")
_ADDRESS = Fault("is an address on the network", "download the pictures, and name the local copies")
_MISSING = Fault("names a file that is not there", "check the paths: they are relative to the data's own folder")
_NO_FILE = Fault("names something that is no file", "name one file for each row")
CLOSED = Fault("names a file that cannot be read", "make the files readable")
_TOO_LARGE = Fault(f"names a file of more than {LARGEST_FILE // 2**20:,} MiB", "check that it is a picture")


def convert_images(values: pa.ChunkedArray, name: str, source: str, file: SourceFile) -> pa.ChunkedArray:
    """Return a column of the type IMAGE, from bytes, from paths, or from the `Image` features of `datasets`.

    Paths are relative to the folder of the file that holds them, and may not lead out of it. One that leads to no
    picture is kept as it is, without a hash; `find_fault` says why.

    Args:
        name: the task's name for the column, for messages; `source` is the data's.

    Raises:
        DataError: values of another type.
    """
    contents, texts = _split(values, name, source, file.place)
    paths = [None if text is None or not text.strip() else text for text in texts.to_pylist()]
    present = contents.is_valid().to_pylist()
    digests = [hashlib.sha256(item.as_buffer()).hexdigest() if item.is_valid else None for item in contents]
    asked = [row for row, path in enumerate(paths) if path is not None and not present[row]]
    look = partial(_look_up, folder=file.folder)
    for row, found in zip(asked, map_in_threads(look, [str(paths[row]) for row in asked]), strict=True):
        paths[row], digests[row] = found
    data = contents.combine_chunks()
    data = data if isinstance(data, pa.Array) else pa.concat_arrays(data.chunks)
    columns = [data, pa.array(paths, pa.string()), pa.array(digests, pa.string())]
    missing = pa.array(
        [path is None and digest is None for path, digest in zip(paths, digests, strict=True)], pa.bool_()
    )
    return pa.chunked_array([pa.StructArray.from_arrays(columns, fields=list(IMAGE), mask=missing)], IMAGE)


def read_picture(value: dict[str, Any], where: str) -> bytes:
    """Return the bytes of one value of an IMAGE column.

    Raises:
        DataError: its file is not the one that was there when the data were opened.
    """
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    try:
        data = Path(value["path"]).read_bytes()
    except OSError as error:
        raise DataError(Problem(f"the picture can no longer be read: {error.strerror}", where)) from None
    if hashlib.sha256(data).hexdigest() != value["digest"]:
        raise DataError(Problem("the picture was changed after the data were opened", where, "start again"))
    return data


def digests_of(examples: Examples, column: str) -> pa.ChunkedArray:
    """Return the hash of each picture's content, null where there is none."""
    return pc.struct_field(examples.table.column(column), "digest")


def without_bytes(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the column as it is where it holds no bytes; else text: each one's path, or how many bytes there were."""
    kind = values.type
    if _is_bytes(kind):
        return pa.chunked_array([pa.array(map(_count_bytes, pc.binary_length(values).to_pylist()), pa.string())])
    if not (pa.types.is_struct(kind) and any(_is_bytes(field.type) for field in kind)):
        return values
    return pa.chunked_array([pa.array([_name(value, kind) for value in values], pa.string())])


def show_picture(value: dict[str, Any]) -> str:
    """Return one value of an IMAGE column in a few words."""
    if value["path"] is None:
        return f"a picture of {_count_bytes(len(value['bytes']))}"
    is_file = value["bytes"] is None and value["digest"] is not None
    return show_value(show_path(Path(value["path"])) if is_file else value["path"])


def _name(value: pa.StructScalar, kind: pa.StructType) -> str | None:
    if not value.is_valid:
        return None
    path = value["path"].as_py() if "path" in kind.names else None
    if path is not None:
        return show_path(Path(path)) if kind == IMAGE and not value["bytes"].is_valid else str(path)
    sizes = [len(part.as_buffer()) for part in value.values() if _is_bytes(part.type) and part.is_valid]
    return _count_bytes(sum(sizes))


def _count_bytes(size: int | None) -> str | None:
    return None if size is None else f"{size:,} bytes"


def _is_bytes(kind: pa.DataType) -> bool:
    types: Any = pa.types
    return any(is_kind(kind) for is_kind in (types.is_binary, types.is_large_binary, types.is_binary_view))


def _is_text(kind: pa.DataType) -> bool:
    types: Any = pa.types
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(is_kind(kind) for is_kind in texts)


def _split(values: pa.ChunkedArray, name: str, source: str, place: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Return the bytes and the paths of a column, in whichever of the known forms it is."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = values.type
    bytes_type, text_type = IMAGE.field("bytes").type, pa.string()
    if _is_bytes(kind):
        return values.cast(bytes_type), _nothing(len(values), text_type)
    if _is_text(kind):
        return _nothing(len(values), bytes_type), values.cast(text_type)
    if pa.types.is_struct(kind):
        parts = {field.name: pc.struct_field(values, field.name) for field in kind}
        contents, paths = (parts.get(key, _nothing(len(values), pa.null())) for key in ("bytes", "path"))
        known = parts.keys() & {"bytes", "path"}
        if known and (_is_bytes(contents.type) or pa.types.is_null(contents.type)) and _is_text(paths.type):
            return contents.cast(bytes_type), paths.cast(text_type)
    what = f"the column {show_name(source)} holds neither pictures (bytes) nor paths of pictures (text), but "
    what += show_name(str(kind))
    remedy = f"write the paths of the pictures there, or map {name} to another column in `target.columns`"
    raise DataError(Problem(what, place, remedy))


def _nothing(size: int, kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([pa.nulls(size, kind)])


def _look_up(text: str, folder: Path | None) -> tuple[str, str | None]:
    """Return full path and hash of the picture that a path names; the path as it is and None, where it names none."""
    if folder is None or find_fault(text, folder) is not None:
        return text, None
    try:
        with (folder / text).open("rb") as file:
            return str(folder / text), hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return text, None


def find_fault(text: str, folder: Path | None) -> Fault | None:
    """Return why a path of a picture in data of this folder is not followed; None where it is."""
    path = PurePosixPath(text)
    if "://" in text:
        return _ADDRESS
    if folder is None or path.is_absolute() or PureWindowsPath(text).is_absolute() or ".." in path.parts:
        return _LEAVES
    return _MISSING if "\0" in text else _find_file_fault(folder / text, folder)


def _find_file_fault(full: Path, folder: Path) -> Fault | None:
    if not path_exists(full):
        return _MISSING
    if not full.resolve().is_relative_to(folder.resolve()):
        return _LEAVES
    if not full.is_file():
        return _NO_FILE
    if not os.access(full, os.R_OK):
        return CLOSED
    return _TOO_LARGE if full.stat().st_size > LARGEST_FILE else None
