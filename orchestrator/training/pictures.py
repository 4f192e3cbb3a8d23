"""Pictures and other files that data files name, for moving the data elsewhere."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import InputError
from orchestrator.recipe import Recipe, resolve_path
from orchestrator.tasks import read_options


def find_named_pictures(recipe: Recipe) -> dict[Path, list[Path]]:
    """Return the pictures and other files that the recipe's data name, by the folder of the files that name them.

    Nothing where the data are not on this machine, or cannot be read: training reports what is wrong with them.
    """
    task_class, options = read_options(recipe)
    columns = [column for column in task_class.columns(options) if column.field.names_files]
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
        for column in columns:
            paths = column.field.paths(examples.table.column(column.name))
            for path, number in zip(paths, examples.file_numbers().tolist(), strict=True):
                folder = folders[number]
                if path is not None and folder is not None:
                    found.setdefault(folder, {})[Path(path)] = None
    return {folder: list(paths) for folder, paths in found.items()}
