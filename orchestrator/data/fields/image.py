"""Pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.examples import IMAGE, Examples, SourceFile
from orchestrator.data.fields.base import Field
from orchestrator.data.fields.image_checks import check_images
from orchestrator.data.fields.images import convert_images, show_picture, without_bytes
from orchestrator.data.formats.image_folders import is_picture, read_pictures
from orchestrator.data.formats.raw import RawFile
from orchestrator.errors import Problem


@dataclass(frozen=True)
class ImageField(Field):
    """Pictures, held as `IMAGE`: their bytes, or the files that they lie in."""

    needs = "pictures (bytes), or paths of pictures (text)"
    plural = "pictures"
    has_letters = False
    names_files = True

    def wanted_type(self, type_: pa.DataType) -> pa.DataType | None:
        return IMAGE

    def convert(self, values: pa.ChunkedArray, name: str, source: str, file: SourceFile) -> pa.ChunkedArray:
        return convert_images(values, name, source, file)

    def open(self, path: Path) -> RawFile | None:
        return read_pictures(path) if path.is_dir() or is_picture(path) else None

    def check(self, splits: Mapping[str, Examples], column: str) -> list[Problem]:
        return check_images(splits, column)

    def keys(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.struct_field(values, "digest")

    def show(self, value: Any) -> str:
        return show_picture(value)

    def mention(self, value: Any) -> str:
        return "a picture"

    def paths(self, values: pa.ChunkedArray) -> list[str | None]:
        found: list[str | None] = pc.struct_field(values, "path").cast(pa.string()).to_pylist()
        return found

    def without_content(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        return without_bytes(values)
