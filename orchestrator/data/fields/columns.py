"""The columns of a task, and the columns of data that they are matched with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.data.fields.base import Field
from orchestrator.data.messages import show_name, show_names
from orchestrator.errors import Problem, nearest
from orchestrator.recipe.origin import Origin


@dataclass(frozen=True)
class Column:
    """A column that a task reads, by the task's own name for it."""

    name: str
    field: Field
    """The kind of value that it holds."""
    required: bool = True
    aliases: tuple[str, ...] = ()
    """Names of it in common data sets, tried in this order when the recipe maps none."""
    may_vary: bool = False
    """Whether some files may have it and others not: their rows hold nulls."""


def check_mapping(columns: Sequence[Column], mapping: Mapping[str, str], origin: Origin) -> list[Problem]:
    """Return what is wrong with `target.columns` whatever the data: unknown keys, columns named twice."""
    known = [column.name for column in columns]
    problems = []
    for key in mapping:
        if key not in known:
            close = nearest(key, known)
            what = f"{show_name(key)} is not a column of this task, which has {show_names(known)}"
            remedy = f"write {close} in place of {show_name(key)}" if close else "name one of the task's columns"
            problems.append(Problem(what, origin.where(f"target.columns.{key}"), remedy))
    for source in dict.fromkeys(mapping.values()):
        keys = [key for key in mapping if mapping[key] == source]
        if len(keys) > 1:
            what = f"the data's column {show_name(source)} is used for {' and '.join(map(show_name, keys))}"
            where = origin.where(f"target.columns.{keys[-1]}")
            problems.append(Problem(what, where, "give each of the task's columns a data column of its own"))
    return problems


def match_columns(
    found: Sequence[str], columns: Sequence[Column], mapping: Mapping[str, str], place: str
) -> tuple[dict[str, str], list[Problem]]:
    """Return the data's column for each of the task's: as mapped, else by its own name, else by an alias; and problems.

    A column that is optional and not mapped may be absent, and so may one that varies; `place` is the file, for the
    problems.
    """
    matched: dict[str, str] = {}
    problems = []
    taken = {mapping[column.name] for column in columns if column.name in mapping}
    free = [name for name in found if name not in taken]
    for column in columns:
        if column.name in mapping:
            wanted = [mapping[column.name]] if mapping[column.name] in found else []
        else:
            wanted = [name for name in (column.name, *column.aliases) if name in free]
        if wanted:
            matched[column.name] = wanted[0]
        elif column.required or (column.name in mapping and not column.may_vary):
            problems.append(missing_column(column, mapping, found, place))
    if not matched and not problems:
        known = [column.name for column in columns]
        what = f"there is none of the columns {show_names(known)}; the columns are {show_names(found)}"
        remedy = f"map them in the recipe, `target.columns: {{{known[0]}: THE_DATA_COLUMN}}`"
        problems.append(Problem(what, place, remedy))
    return matched, problems


def missing_column(column: Column, mapping: Mapping[str, str], found: Sequence[str], place: str) -> Problem:
    """Return the problem of a column that is not among the data's (`found`)."""
    wanted = mapping.get(column.name, column.name)
    close = nearest(wanted, found)
    what = f"there is no column {show_name(wanted)}; the columns are {show_names(found)}"
    target = show_name(close) if close else "THE_DATA_COLUMN"
    remedy = f"map it in the recipe, `target.columns: {{{column.name}: {target}}}`, or on the command line"
    return Problem(what, place, f"{remedy}: `target.columns.{column.name}={target}`")
