"""Find the pictures that data files name, to copy them with the data."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.errors import InputError
from orchestrator.recipe import Recipe, resolve_path
from orchestrator.tasks import read_options


def find_named_pictures(recipe: Recipe) -> dict[Path, list[Path]]:
    """Return the pictures that the recipe's data files name, by the folder of those files.

    There are none where the data are not on this machine, or cannot be read; training reports such errors.
    """
    task_class, options = read_options(recipe)
    columns = [column.name for column in task_class.columns(options) if column.kind == "image"]
    data = recipe.target.data if isinstance(recipe.target.data, str) else recipe.target.data.path
    if not columns or (data is not None and resolve_path(data, recipe.origin) is None):
        return {}
    from orchestrator.training.prepare import read_examples  # It imports torch, which takes seconds.

    try:
        splits = read_examples(recipe, task_class, options)
    except InputError:
        return {}
    found: dict[Path, dict[Path, None]] = {}
    for examples in splits.values():
        folders = [file.folder for file in examples.files]
        for name in columns:
            paths = pc.struct_field(examples.table.column(name), "path").cast(pa.string()).to_pylist()
            for path, number in zip(paths, examples.file_numbers().tolist(), strict=True):
                folder = folders[number]
                if path is not None and folder is not None:
                    found.setdefault(folder, {})[Path(path)] = None
    return {folder: list(paths) for folder, paths in found.items()}
