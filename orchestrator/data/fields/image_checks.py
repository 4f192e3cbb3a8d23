"""Checks of pictures. Each is decoded once; what is found is cached by content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.cache import cached_table, content_key
from orchestrator.data.examples import Examples
from orchestrator.data.fields.base import group_rows
from orchestrator.data.fields.decode import EMPTY, TOO_LARGE, BrokenPicture, decode, quiet_decoding
from orchestrator.data.fields.images import CLOSED, Fault, digests_of, find_fault, read_picture, show_picture
from orchestrator.data.messages import show_name
from orchestrator.data.threads import map_in_threads
from orchestrator.errors import Problem

_SURVEY_VERSION = 1  # Part of the cache's key: raise it when `decode` judges the same bytes otherwise.
_SURVEY = pa.schema({"why": pa.string(), "detail": pa.string(), "kind": pa.string(), "is_animated": pa.bool_()})


def check_images(splits: Mapping[str, Examples], column: str) -> list[Problem]:
    """Return problems of pictures that are missing, empty, damaged or too large, and warnings of those changed to RGB.

    Raises:
        DataError: a picture's file was changed since the data were opened.
    """
    problems = []
    kinds: Counter[str] = Counter()
    num_animated = 0
    for examples in splits.values():
        found = _survey(examples, column)
        problems += _find_broken(examples, column, found)
        kinds.update(kind for kind in found["kind"].to_pylist() if kind not in (None, "RGB"))
        num_animated += pc.sum(found["is_animated"]).as_py() or 0
    total = sum(map(len, splits.values()))
    place = splits["train"].files[0].place if "train" in splits else next(iter(splits.values())).files[0].place
    if kinds:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        what = f"{kinds.total():,} of {total:,} pictures are not plain RGB ({counts}); the model reads them as RGB"
        remedy = "look at some of them if colours matter (what is transparent becomes white)"
        problems.append(Problem(what, place, remedy, fatal=False))
    if num_animated:
        what = f"{num_animated:,} of {total:,} pictures have several frames, of which the first is read"
        problems.append(Problem(what, place, "save the frame that matters as a picture of its own", fatal=False))
    return problems


def _find_broken(examples: Examples, column: str, found: pa.Table) -> list[Problem]:
    values = examples.table.column(column)
    remedy = "remove these rows, or name their pictures"
    problems = [group_rows(examples, column, values.is_null(), "is missing (null)", remedy, show_picture)]
    for fault, rows in _find_lost(examples, column).items():
        mask = pa.chunked_array([np.isin(np.arange(len(examples)), rows)])
        problems.append(group_rows(examples, column, mask, fault.what, fault.remedy, show_picture))
    for why in pc.unique(found["why"]).drop_null().to_pylist():
        mask = pc.equal(found["why"], why)
        first = found["detail"][pc.index(mask, True).as_py()].as_py()
        text = f"{why} ({show_name(first)})" if first else why
        problems.append(group_rows(examples, column, mask, text, _remedy(why), show_picture))
    return [problem for problem in problems if problem]


def _find_lost(examples: Examples, column: str) -> dict[Fault, list[int]]:
    """Return rows whose path leads to no picture, by what is wrong with it."""
    values = examples.table.column(column)
    lost: dict[Fault, list[int]] = {}
    for row in np.flatnonzero(pc.and_(values.is_valid(), digests_of(examples, column).is_null()).to_numpy()).tolist():
        fault = find_fault(values[row].as_py()["path"], examples.source(row)[0].folder) or CLOSED
        lost.setdefault(fault, []).append(row)
    return lost


def _remedy(why: str) -> str:
    if why == EMPTY:
        return "copy these files again, or remove the rows"
    if why == TOO_LARGE:
        return "make these pictures smaller; the model reads far fewer pixels"
    return "save these pictures again (as PNG or JPEG), or remove the rows"


def _survey(examples: Examples, column: str) -> pa.Table:
    """Return the kind of each picture, or why it cannot be read; one row an example. Null where there is no picture."""
    digests = digests_of(examples, column).to_pylist()
    key = content_key("pictures", _SURVEY_VERSION, PIL.__version__, digests)
    return cached_table(key, lambda: _look_at_all(examples, column))


def _look_at_all(examples: Examples, column: str) -> pa.Table:
    values = examples.table.column(column)

    def look(row: int) -> dict[str, Any]:
        value = values[row].as_py()
        if value is None or value["digest"] is None:
            return {}
        try:
            picture = decode(read_picture(value, examples.where(row)), small=True)
        except BrokenPicture as error:
            return {"why": error.why, "detail": error.detail}
        return {"kind": picture.kind, "is_animated": picture.is_animated}

    with quiet_decoding():
        return pa.Table.from_pylist(list(map_in_threads(look, range(len(examples)))), _SURVEY)
