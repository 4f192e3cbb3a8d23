"""Open what `target.data` names: files, a folder of splits, or a Hub id; with the task's columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from orchestrator.data.column_types import describe_type, plain_type
from orchestrator.data.examples import Examples
from orchestrator.data.fields.base import Part
from orchestrator.data.fields.columns import Column, check_mapping, match_columns, missing_column
from orchestrator.data.formats.folders import SPLIT_WORDS, find_label_list, find_split, find_splits, folder_files
from orchestrator.data.formats.hub import open_hub, stream_hub
from orchestrator.data.formats.image_folders import read_class_folders
from orchestrator.data.formats.raw import RawFile
from orchestrator.data.formats.readers import missing_path, read_file
from orchestrator.data.formats.streamed_files import stream_file
from orchestrator.data.messages import show_name
from orchestrator.data.mixing import draw_counts
from orchestrator.data.streaming import SamplePlan, Streamed, draw_files, plan_sample
from orchestrator.errors import DataError, Problem
from orchestrator.recipe.origin import Origin
from orchestrator.recipe.paths import resolve_path, split_count
from orchestrator.recipe.schema import Data, Recipe

_Open = Callable[[SamplePlan | None], list[RawFile]]
"""Opens a split: all of it, or as much as is to be drawn."""


def open_splits(recipe: Recipe, columns: Sequence[Column]) -> dict[str, Examples]:
    """Return the splits that the recipe's data have: `train`, and `select` and `test` where present.

    Raises:
        DataError: all that is wrong with the files and their columns, in all splits at once.
    """
    mapping = recipe.target.columns
    problems = check_mapping(columns, mapping, recipe.origin)
    splits: dict[str, Examples] = {}
    try:
        sources = _locate(recipe.target.data, recipe.origin)
    except DataError as error:
        raise DataError([*problems, *error.problems]) from error
    for split, open_source in sources.items():
        try:
            plan = plan_sample(recipe, columns, sources) if split == "train" else None
            splits[split] = draw_counts(_read(open_source(plan), columns, mapping), recipe.target.split.seed)
        except DataError as error:
            problems.extend(error.problems)
    problems.extend(_uneven_columns(splits, _varying(columns)))
    if problems:
        raise DataError(problems)
    return splits


def open_files(paths: Sequence[Path], columns: Sequence[Column], mapping: Mapping[str, str]) -> Examples:
    """Return one split from local files, in their order.

    Raises:
        DataError: what is wrong with the files and their columns.
    """
    return _read(_read_files(paths), columns, mapping)


def open_file(path: Path) -> Examples:
    """Return all columns of one file under their own names, but for those that Arrow cannot hold (of several types).

    Raises:
        DataError: what is wrong with the file.
    """
    raw = read_file(path)
    columns = {}
    for name in raw.names:
        try:
            values = raw.fetch(name)
            wanted = plain_type(values.type)
            columns[name] = values if wanted is None else values.cast(wanted)
        except (DataError, pa.ArrowInvalid):
            continue
    if not raw.num_rows:
        raise DataError(Problem("there are no examples in the data", raw.place, "add examples, or name another file"))
    return Examples(pa.table(columns), np.arange(raw.num_rows), (raw.source,))


def open_values(path: Path, columns: Sequence[Column]) -> Examples | None:
    """Read a path that is no data file but holds values of one of the columns, such as a picture or a folder of them.

    Returns:
        What `open_file` returns of other data; None where the path holds no such values.

    Raises:
        DataError: a folder that holds none.
    """
    for column in columns:
        raw = column.field.open(path)
        if raw is not None:
            table = pa.table({name: raw.fetch(name) for name in raw.names})
            return Examples(table, np.arange(raw.num_rows), (raw.source,))
    return None


def rename_columns(given: Examples, columns: Sequence[Column], mapping: Mapping[str, str]) -> Examples:
    """Return the task's columns among those of `open_file`, under the task's names.

    Raises:
        DataError: a column is missing or of the wrong type.
    """
    place = given.files[0].place
    known = {key: value for key, value in mapping.items() if key in {column.name for column in columns}}
    matched, problems = match_columns(given.table.column_names, columns, known, place)
    table = {}
    for column in columns:
        if column.name in matched:
            source = matched[column.name]
            values = given.table.column(source)
            try:
                table[column.name] = column.field.convert(values, column.name, source, given.files[0])
            except DataError as error:
                problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return Examples(pa.table(table), given.rows, given.files)


def _locate(data: str | Data, origin: Origin) -> dict[str, _Open]:
    """Return how each split is opened: those that `data` names, else those that are found."""
    if isinstance(data, str):
        data = Data(path=data)
        place = "target.data"
    else:
        place = "target.data.path"
    named = {split: value for split in SPLIT_WORDS if (value := getattr(data, split)) is not None}
    if data.path is None:
        return {split: _written_out(split, value, origin) for split, value in named.items()}
    path = resolve_path(data.path, origin)
    if named:
        named = {"train": "train", **named}
    if path is None:
        texts = {split: value if isinstance(value, str) else "+".join(value) for split, value in named.items()}
        hub = (data.path, data.name, data.revision, texts, origin.where(place))
        if data.stream:
            return stream_hub(*hub)
        return {split: partial(_as_it_is, raw) for split, raw in open_hub(*hub).items()}
    if path.is_dir():
        if not named:
            found = find_splits(path)
            return {split: partial(_read_files, files) for split, files in found.items()}
        return {split: partial(_read_named, path, value, origin, split) for split, value in named.items()}
    if not split_count(path)[0].exists():
        problem = missing_path(path)
        raise DataError(Problem(f"{problem.what} ({origin.where(place)})", problem.where, problem.remedy))
    return {"train": partial(_read_files, [path])}


def _written_out(split: str, value: str | list[str], origin: Origin) -> _Open:
    texts = [value] if isinstance(value, str) else value
    # Without `path` these are files, even if they do not look like one.
    paths = [resolve_path(text, origin) or origin.folder / text for text in texts]
    return partial(_read_files, paths)


def _as_it_is(raw: RawFile, _plan: SamplePlan | None) -> list[RawFile]:
    return [raw]


def _read_named(
    folder: Path, value: str | list[str], origin: Origin, split: str, plan: SamplePlan | None
) -> list[RawFile]:
    """Return the splits of a local folder with these names."""
    paths: list[Path] = []
    for name in [value] if isinstance(value, str) else value:
        found = find_split(folder, (name.lower(),))
        if not found:
            what = f"the folder {show_name(str(folder))} has neither a file {name}.* nor a subfolder {name}"
            where = origin.where(f"target.data.{split}")
            raise DataError(Problem(what, where, "name a split that is there, without suffix"))
        paths.extend(found)
    return _read_files(paths, plan)


def _read_files(paths: Sequence[Path], plan: SamplePlan | None = None) -> list[RawFile]:
    if plan is not None:
        return _stream_files(paths, plan)
    raws: list[RawFile] = []
    problems: list[Problem] = []
    for part, given in enumerate(paths):
        path, count = split_count(given)
        try:
            for file in _files_of(path):
                raw = read_class_folders(file) if file.is_dir() else read_file(file)
                raws.append(_with_names(replace(raw, part=part, count=count), file))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return raws


def _stream_files(paths: Sequence[Path], plan: SamplePlan) -> list[RawFile]:
    streams: list[Streamed] = []
    origins: list[tuple[int, Path]] = []
    problems: list[Problem] = []
    for part, path in enumerate(paths):
        names: dict[str, None] = {}
        try:
            for file in _files_of(path):
                streams.append(stream_file(file, plan.names, names))
                origins.append((part, file))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    raws = draw_files(streams, [part for part, _ in origins], plan)
    return [_with_names(replace(raw, part=part), file) for raw, (part, file) in zip(raws, origins, strict=True)]


def _files_of(path: Path) -> list[Path]:
    return folder_files(path) if path.is_dir() else [path]


def _with_names(raw: RawFile, file: Path) -> RawFile:
    """Add the label names beside the file, for every column that has none itself."""
    names = find_label_list(file)
    return replace(raw, label_names={**dict.fromkeys(raw.names, names), **raw.label_names}) if names else raw


def _read(raws: Sequence[RawFile], columns: Sequence[Column], mapping: Mapping[str, str]) -> Examples:
    """Return the task's columns of some files, one after the other."""
    problems: list[Problem] = []
    tables: list[dict[str, Part]] = []
    used = [raw for raw in raws if raw.num_rows]
    if not used:
        place = raws[0].place if raws else None
        raise DataError(Problem("there are no examples in the data", place, "add examples, or name another file"))
    for raw in used:
        matched, missing = match_columns(raw.names, columns, mapping, raw.place)
        problems.extend(missing)
        table = {}
        for column in columns:
            if column.name in matched:
                try:
                    table[column.name] = column.field.read(raw, column.name, matched[column.name])
                except DataError as error:
                    problems.extend(error.problems)
        tables.append(table)
    if not problems:
        gone = [column for column in columns if column.name in mapping and not any(column.name in t for t in tables)]
        problems = [missing_column(column, mapping, used[0].names, used[0].place) for column in gone]
    if problems:
        raise DataError(problems)
    return _join(used, tables, columns)


def _join(raws: Sequence[RawFile], tables: Sequence[Mapping[str, Part]], columns: Sequence[Column]) -> Examples:
    """Return the columns of all files as one table, with the names that they declare for its values."""
    unified: list[dict[str, pa.ChunkedArray]] = [dict.fromkeys(table) for table in tables]
    parts = {column.name: [table[column.name] for table in tables if column.name in table] for column in columns}
    for column in columns:
        values = iter(column.field.unify(parts[column.name]))
        for own in unified:
            if column.name in own:
                own[column.name] = next(values)
    table = _concatenate([raw.place for raw in raws], unified, _varying(columns))
    names = {}
    for column in columns:
        if column.name in table.column_names:
            position = table.column_names.index(column.name)
            finished = column.field.finish(table.column(position), parts[column.name])
            table = table.set_column(position, column.name, finished)
            declared = dict.fromkeys(chain.from_iterable(part.names or () for part in parts[column.name]))
            if declared:
                names[column.name] = tuple(declared)
    files = tuple(replace(raw.source, columns=tuple(own)) for raw, own in zip(raws, tables, strict=True))
    return Examples(table, np.arange(table.num_rows), files, names)


def _varying(columns: Sequence[Column]) -> set[str]:
    return {column.name for column in columns if column.may_vary}


def _concatenate(
    places: Sequence[str], tables: Sequence[Mapping[str, pa.ChunkedArray]], may_vary: Collection[str]
) -> pa.Table:
    """Concatenate the tables of one split; whole numbers and numbers become numbers, other types must agree.

    Where one of `may_vary` is lacking, its rows are null.
    """
    joined: dict[str, pa.ChunkedArray] = {}
    for name in dict.fromkeys(chain.from_iterable(tables)):
        found = [(place, table[name]) for place, table in zip(places, tables, strict=True) if name in table]
        lacking = [place for place, table in zip(places, tables, strict=True) if name not in table]
        if lacking and name not in may_vary:
            raise DataError(_uneven(name, found[0][0], lacking[0], "all files of a split"))
        types = {part.type for _, part in found if part.null_count < len(part)} or {pa.string()}
        if types == {pa.int64(), pa.float64()}:
            types = {pa.float64()}
        if len(types) > 1:
            kinds = [f"{describe_type(part.type)} in {place}" for place, part in found]
            what = f"{name} differs in type between the files of one split: {', '.join(dict.fromkeys(kinds))}"
            raise DataError(Problem(what, places[0], "write the column in one type"))
        type_ = types.pop()
        parts = [table.get(name, _nulls(table)) for table in tables]
        joined[name] = pa.chunked_array([chunk for part in parts for chunk in _cast(part, type_).chunks], type_)
    return pa.table(joined).combine_chunks()


def _nulls(table: Mapping[str, pa.ChunkedArray]) -> pa.ChunkedArray:
    """Return as many nulls as the table has rows."""
    return pa.chunked_array([pa.nulls(len(next(iter(table.values()))), pa.string())])


def _cast(part: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([pa.nulls(len(part), type_)]) if part.null_count == len(part) else part.cast(type_)


def _uneven_columns(splits: Mapping[str, Examples], may_vary: Collection[str]) -> list[Problem]:
    """Return problems of optional columns that one split has and another lacks."""
    problems = []
    train = splits.get("train")
    for split, examples in splits.items():
        if train is None or split == "train":
            continue
        for name in sorted((set(train.table.column_names) ^ set(examples.table.column_names)) - set(may_vary)):
            has, lacks = (train, examples) if name in train.table.column_names else (examples, train)
            problems.append(_uneven(name, has.files[0].place, lacks.files[0].place, "all splits"))
    return problems


def _uneven(name: str, has: str, lacks: str, everywhere: str) -> Problem:
    return Problem(f"{name} is a column of {has} but not of {lacks}", lacks, f"give {everywhere} the same columns")
