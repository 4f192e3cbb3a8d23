"""Data sets from the Hugging Face Hub, through `datasets`. Loading scripts are never run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.formats.arrow_files import raw_table
from orchestrator.data.formats.folders import SPLIT_WORDS
from orchestrator.data.formats.raw import RawFile
from orchestrator.data.formats.streamed_files import StreamedTables
from orchestrator.data.messages import show_name, show_names
from orchestrator.data.streaming import MAX_TURN, Draw, draw_files
from orchestrator.errors import DataError, Problem

_REACH_SECONDS = 3.0
_SHARDS_TOGETHER = 8  # Each is a connection, and the first rows of one may be a large download.


def open_hub(
    path: str, name: str | None, revision: str | None, named: Mapping[str, str], where: str
) -> dict[str, RawFile]:
    """Return the splits of a Hub data set: those `named` (split -> the Hub's name for it), or else all that are found.

    Raises:
        DataError: no such data set, configuration or split; a gated one; no network and no local copy.
    """
    loaded = _load_splits({"path": path, "name": name, "revision": revision}, named, where)
    return {split: _raw_split(f"{path} {hub_split}", data) for split, (hub_split, data) in loaded.items()}


def stream_hub(
    path: str, name: str | None, revision: str | None, named: Mapping[str, str], where: str
) -> dict[str, Callable[[Draw | None], list[RawFile]]]:
    """Return the same splits, each read as far as a draw says, or whole; only what is read is downloaded.

    Rows come from the beginnings of the split's shards (its files on the Hub), in turns: there is no reading from
    anywhere else without all that stands before.

    Raises:
        DataError: as `open_hub`.
    """
    options = {"path": path, "name": name, "revision": revision, "streaming": True}
    loaded = _load_splits(options, named, where)
    return {split: partial(_read_shards, data, path, hub_split, where) for split, (hub_split, data) in loaded.items()}


def _load_splits(options: Mapping[str, Any], named: Mapping[str, str], where: str) -> dict[str, tuple[str, Any]]:
    """Return for each split the Hub's name for it, and what `datasets` has loaded."""
    if named:
        return {split: (hub_split, _load(options, hub_split, where)) for split, hub_split in named.items()}
    every = _load(options, None, where)
    loaded = {}
    for split, words in SPLIT_WORDS.items():
        found = [word for word in words if word in every]
        if found:
            loaded[split] = (found[0], every[found[0]])
    if "train" not in loaded:
        path = options["path"]
        what = f"the data set {show_name(path)} has no split named train; it has {show_names(every)}"
        raise DataError(Problem(what, where, f"write `data: {{path: {path}, train: SPLIT, test: SPLIT}}`"))
    return loaded


def _read_shards(data: Any, path: str, hub_split: str, where: str, plan: Draw | None) -> list[RawFile]:
    """Return the rows of a streamed split, of each shard by itself, so that its rows can be counted."""
    number = data.num_shards
    files = []
    for index in range(number):
        place = f"{path} {hub_split}{f' shard {index}' if number > 1 else ''}"
        explain = partial(_explain, path=path, where=where, reachable=True)
        files.append(_stream_shard(data.shard(number, index), place, explain, plan))
    if plan is not None:
        return draw_files(files, [0] * number, plan, _SHARDS_TOGETHER)
    return [file.raw(list(file.read(0, MAX_TURN))) for file in files]


def _stream_shard(data: Any, place: str, explain: Callable[[Exception], Problem], plan: Draw | None) -> StreamedTables:
    import datasets

    schema = None if data.features is None else data.features.arrow_schema
    if plan is not None and schema is not None:
        data = data.select_columns([name for name in schema.names if name in plan.names] or schema.names[:1])

    def read(_piece: int, turn: int) -> Iterator[pa.Table]:
        try:
            yield from data.with_format("arrow").iter(turn)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise DataError(explain(error)) from error

    return StreamedTables(place, schema, [0], [1.0], read)


def _load(options: Mapping[str, Any], split: str | None, where: str) -> Any:
    import datasets

    with offline_unless_reachable() as reachable:
        try:
            return datasets.load_dataset(**options, split=split)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise DataError(_explain(error, str(options["path"]), where, reachable)) from error


def _explain(error: Exception, path: str, where: str, reachable: bool) -> Problem:
    lines = str(error).splitlines()
    detail = show_name(lines[0]) if lines else type(error).__name__
    if not reachable or isinstance(error, ConnectionError):
        what = f"the data set {show_name(path)} is not on this machine, and the Hugging Face Hub cannot be reached"
        remedy = f"connect to the network, or name local files; a path to a local folder is written ./{path}"
        return Problem(what, where, remedy)
    text = str(error)
    if "gated" in text:
        what = f"the data set {show_name(path)} is gated"
        remedy = f"ask for access at https://huggingface.co/datasets/{path}, then `hf auth login` or set HF_TOKEN"
    elif "scripts are no longer supported" in text:
        what = f"the data set {show_name(path)} is a loading script, which is never run"
        remedy = "use a copy in Parquet (many have a revision refs/convert/parquet), or local files"
    elif isinstance(error, FileNotFoundError):
        what = f"the data set {show_name(path)} is not on the Hugging Face Hub: {detail}"
        remedy = f"check its name and revision; a private one needs HF_TOKEN, a local folder is written ./{path}"
    else:
        what = f"the data set {show_name(path)} cannot be loaded: {detail}"
        remedy = f"check its configuration (`name`) and splits at https://huggingface.co/datasets/{path}"
    return Problem(what, where, remedy)


@contextmanager
def offline_unless_reachable() -> Iterator[bool]:
    """Look in the local cache only, as HF_HUB_OFFLINE=1 does, when the Hub's host does not answer.

    Its client would retry for half a minute before it said so.
    """
    import datasets
    import huggingface_hub

    if datasets.config.HF_HUB_OFFLINE or _reaches(datasets.config.HF_ENDPOINT):
        yield not datasets.config.HF_HUB_OFFLINE
        return
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield False
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _reaches(endpoint: str) -> bool:
    import socket
    from urllib.request import getproxies

    parts = urlsplit(endpoint)
    proxies = getproxies()
    if parts.scheme in proxies or "all" in proxies or "ALL_PROXY" in os.environ:
        return True  # Behind a proxy, the host's own address says nothing.
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=_REACH_SECONDS).close()
    except OSError:
        return False
    return True


def _raw_split(place: str, data: Any) -> RawFile:
    def fetch(column: str) -> Any:
        values = data.select_columns([column]).with_format("arrow")[:].column(column)
        return _with_bytes(values, data.features[column], place)

    schema = data.features.arrow_schema
    return raw_table(place, schema, data.num_rows, fetch)


def _with_bytes(values: pa.ChunkedArray, feature: Any, place: str) -> pa.ChunkedArray:
    """Return pictures that were downloaded as files of their own, with their bytes read in."""
    import datasets

    if not isinstance(feature, datasets.Image) or not pc.any(pc.is_null(pc.struct_field(values, "bytes"))).as_py():
        return values
    try:
        chunks = [feature.embed_storage(chunk, remote_files=False) for chunk in values.chunks]
    except OSError as error:
        what = f"a downloaded picture cannot be read: {error}"
        raise DataError(Problem(what, place, "download the data set anew")) from None
    return pa.chunked_array(chunks)
