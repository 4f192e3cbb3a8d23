"""Pictures that lie in folders: a folder for each class, or just pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from orchestrator.data.formats.raw import RawFile
from orchestrator.data.messages import NUM_SHOWN, show_name, show_names, show_some
from orchestrator.errors import DataError, Problem
from orchestrator.recipe.paths import show_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".pbm")
"""Names of pictures end so, in lower or upper case."""


def holds_pictures(folder: Path) -> bool:
    """Whether any picture lies in the folder, at whatever depth."""
    return next(_walk(folder), None) is not None


def read_class_folders(folder: Path) -> RawFile:
    """Return the pictures (`image`) of a folder that has a subfolder for each class, whose name is the `label`.

    Pictures may lie deeper in a class's folder. Files that are no pictures by their suffix are passed over, and so are
    hidden ones.

    Raises:
        DataError: no class folders, class folders without pictures, pictures outside of them.
    """
    entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))
    pictures = {entry.name: [f"{entry.name}/{path}" for path in sorted(_walk(entry))] for entry in entries}
    loose = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and _is_picture(entry.name))
    problems = []
    if not any(pictures.values()):
        what = f"the folder holds {len(loose)} pictures, but no folder for each class"
        raise DataError(Problem(what, show_path(folder), "put the pictures of each class into a folder of its name"))
    if loose:
        shown = show_some([show_name(name) for name in loose[:NUM_SHOWN]], len(loose))
        what = f"{len(loose)} pictures lie beside the folders of the classes, so they have no class: {shown}"
        problems.append(Problem(what, show_path(folder), "move each into the folder of its class"))
    empty = [name for name, found in pictures.items() if not found]
    if empty:
        what = f"{len(empty)} of {len(pictures)} folders of classes have no pictures: {show_names(empty)}"
        remedy = f"add pictures ({', '.join(SUFFIXES[:3])}, ...), or remove the folders"
        problems.append(Problem(what, show_path(folder), remedy))
    if problems:
        raise DataError(problems)
    labels = [name for name, found in pictures.items() for _ in found]
    return _raw_pictures(folder, [path for found in pictures.values() for path in found], {"label": labels})


def read_pictures(path: Path) -> RawFile:
    """Return one picture, or all pictures of a folder at whatever depth, as the column `image`.

    Raises:
        DataError: the folder holds none.
    """
    if not path.is_dir():
        return _raw_pictures(path.parent, [path.name], {})
    found = sorted(_walk(path))
    if not found:
        what = "the folder holds no pictures"
        raise DataError(Problem(what, show_path(path), f"name one that holds some ({', '.join(SUFFIXES)})"))
    return _raw_pictures(path, found, {})


def is_picture(path: Path) -> bool:
    """Whether this is a file with the suffix of a picture."""
    return _is_picture(path.name) and path.is_file()


def _raw_pictures(folder: Path, paths: list[str], others: dict[str, list[str]]) -> RawFile:
    place = show_path(folder)
    odd = [name for name in paths if not _is_unicode(name)]
    if odd:
        shown = show_some([show_name(ascii(name)) for name in odd[:NUM_SHOWN]], len(odd))
        raise DataError(Problem(f"{len(odd)} file names are not UTF-8: {shown}", place, "rename these files"))
    columns = {"image": paths, **others}

    def fetch(name: str) -> pa.ChunkedArray:
        return pa.chunked_array([pa.array(columns[name], pa.string())])

    places = tuple(f"{place}/{name}" for name in paths)
    return RawFile(place, tuple(columns), len(paths), fetch, labels_are_names=True, row_places=places, folder=folder)


def _walk(folder: Path) -> Iterator[str]:
    """Return paths of the pictures in a folder, relative to it."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        inside = Path(root).relative_to(folder)
        yield from ((inside / name).as_posix() for name in files if _is_picture(name) and not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in name)
