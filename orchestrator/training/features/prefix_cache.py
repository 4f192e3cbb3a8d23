"""Compute the frozen prefix once: the output of the frozen blocks for each example is stored, and later epochs start
there.

One forward pass writes all wanted boundaries, starting at the highest boundary below them that is stored. Workers and
trials on one machine compute an entry together, each of them other shards of its examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.data.batches import cheapest_cuts
from orchestrator.data.cache import cache_folder, content_key
from orchestrator.data.feature_store import FeatureStore, Layout, StoredFeatures, Writer, wait_for_others
from orchestrator.models import Prefix
from orchestrator.models.shortcuts.token_pooling import is_close
from orchestrator.recipe import Recipe
from orchestrator.storage import RemoteFolder, is_url, join
from orchestrator.tasks import Encoded
from orchestrator.training.engine.base import Engine
from orchestrator.training.features.shared import SharedFeatures
from orchestrator.training.split_loader import SplitLoader, as_array, as_tensor

FEATURES_VERSION = 1  # Part of each key. Increase it when the same model and data are stored differently.
ROWS_PER_SHARD = 256
TOKENS_IN_PASS = 4096
EXAMPLES_IN_PASS = 64
BATCH_MATTERS = "their output for an example depends on the other examples of its batch"
BATCH_TOLERANCE = 3e-2  # Relative. bf16 and TF32 round differently in a batch of another size.

ReportPhase = Callable[[str], None]
Indices = npt.NDArray[np.int64]


@dataclass
class PrefixCache:
    """The stored prefixes of one model."""

    store: FeatureStore
    prefix: Prefix
    engine: Engine
    identity: Sequence[str]
    """Everything that the frozen blocks' output depends on, besides the examples and the boundary."""
    report_phase: ReportPhase
    shared: SharedFeatures | None = None
    """The features of other machines; None without an object store."""

    def key(self, examples: str, boundary: int) -> str:
        """Return the name of an entry; `examples` is the key of the encoded split."""
        pooling = self.prefix.pooling
        pooled = pooling.position if pooling is not None and self.prefix.is_pooled(boundary) else "all"
        return content_key(FEATURES_VERSION, *self.identity, examples, boundary, pooled)

    def open(self, examples: str, boundary: int) -> StoredFeatures | None:
        return self.store.open(self.key(examples, boundary))

    def download(self, examples: Sequence[str], boundaries: Sequence[int]) -> None:
        """Download the entries of these splits that another machine has computed. All workers call this, and wait."""
        if self.shared is not None:
            self.shared.download(self.key(each, boundary) for each in examples for boundary in boundaries)

    def rows(self, examples: str, encoded: Encoded, boundaries: Sequence[int]) -> dict[int, StoredFeatures] | str:
        """Return the entries of a split at these boundaries, computing missing ones; or why they cannot be stored.

        Raises:
            OSError: the disk failed or filled up on the way.
            CallFailed, BoundaryNotReached: as `Prefix.compute`.
        """
        found = {boundary: self.open(examples, boundary) for boundary in boundaries}
        missing = [boundary for boundary, rows in found.items() if rows is None]
        if missing:
            layouts = self._layouts(encoded, missing)
            if self._depends_on_batch(encoded, layouts):
                return BATCH_MATTERS
            kept = frozenset(self.key(examples, boundary) for boundary in boundaries)
            reason = self.store.make_room(self._bytes_to_come(examples, layouts), kept)
            if reason is not None:
                return reason
            with self._writers(examples, layouts, encoded) as writers:
                self._compute(examples, encoded, writers)
            found |= {boundary: self.store.finish(self.key(examples, boundary)) for boundary in missing}
        if self.shared is not None:
            self.shared.upload(self.key(examples, boundary) for boundary in boundaries)
        return {boundary: rows for boundary, rows in found.items() if rows is not None}

    def sizes(self, encoded: Encoded, boundaries: Sequence[int]) -> dict[int, int]:
        """Return the bytes that a split's entries take at these boundaries."""
        return {boundary: layout.num_bytes for boundary, (layout, _) in self._layouts(encoded, boundaries).items()}

    def _bytes_to_come(self, examples: str, layouts: dict[int, tuple[Layout, str]]) -> int:
        return sum(
            self.store.bytes_to_come(self.key(examples, boundary), layout) for boundary, (layout, _) in layouts.items()
        )

    def _layouts(self, encoded: Encoded, boundaries: Sequence[int]) -> dict[int, tuple[Layout, str]]:
        """Return the layout of each boundary's rows, and the name of their dtype, from one small batch."""
        some = shortest_and_longest(encoded)
        layouts = {}
        for boundary, values in self._forward(encoded, some, boundaries).items():
            array, name = as_array(values)
            # Rows are ragged where they hold a vector for each token of uneven texts.
            longest = int(encoded.lengths[some].max())
            ragged = array.ndim == 3 and array.shape[1] == longest > 1 and np.ptp(encoded.lengths) > 0
            lengths = tuple(map(int, encoded.lengths)) if ragged else None
            layouts[boundary] = Layout(array.shape[2 if ragged else 1 :], str(array.dtype), len(encoded), lengths), name
        return layouts

    def _depends_on_batch(self, encoded: Encoded, layouts: dict[int, tuple[Layout, str]]) -> bool:
        """Whether an example has other features, in shape or in values, alone than in a batch.

        Some models pad texts to whole windows, or mix the examples of a batch.
        """
        some = shortest_and_longest(encoded)
        shortest = some[np.argsort(encoded.lengths[some], kind="stable")[:1]]
        both, alone = (self._forward(encoded, rows, list(layouts)) for rows in (some, shortest))
        for boundary, (layout, _) in layouts.items():
            values = both[boundary][some == shortest[0]]
            if layout.lengths is not None:
                values = values[:, : max(1, layout.lengths[shortest[0]])]
            if not is_close(alone[boundary].float(), values.float(), BATCH_TOLERANCE):
                return True
        return False

    @contextmanager
    def _writers(
        self, examples: str, layouts: dict[int, tuple[Layout, str]], encoded: Encoded
    ) -> Iterator[dict[int, Writer]]:
        num_shards = len(shards(encoded.lengths))
        writers = {
            boundary: self.store.writer(self.key(examples, boundary), layout, num_shards, name)
            for boundary, (layout, name) in layouts.items()
        }
        try:
            yield writers
        finally:
            for writer in writers.values():
                writer.close()

    def _compute(self, examples: str, encoded: Encoded, writers: dict[int, Writer]) -> None:
        """Compute the shards that no other process computes, until all are done."""
        parts = shards(encoded.lengths)
        start, stored = self._nearest(examples, min(writers))
        while not all(writer.is_complete for writer in writers.values()):
            idle = True
            for number, rows in enumerate(parts):
                open_ones = {boundary: writer for boundary, writer in writers.items() if not writer.is_done(number)}
                if not open_ones:
                    continue
                first = next(iter(open_ones.values()))
                with first.claim(number) as mine:
                    if mine and not first.is_done(number):
                        idle = False
                        self.report_phase(f"storing the frozen prefix: {100 * number // len(parts)} %")
                        self._compute_shard(encoded, rows, open_ones, start, stored)
                        for writer in open_ones.values():
                            writer.mark_done(number)
            if idle:
                wait_for_others()

    def _compute_shard(
        self,
        encoded: Encoded,
        rows: Indices,
        writers: dict[int, Writer],
        start: int | None,
        stored: StoredFeatures | None,
    ) -> None:
        for some in passes(encoded.lengths, rows, self.engine.cost_of_pass):
            for boundary, values in self._forward(encoded, some, list(writers), start, stored).items():
                array, _ = as_array(values)
                for row, line in zip(some, array, strict=True):
                    writers[boundary].write(int(row), line)

    def _nearest(self, examples: str, boundary: int) -> tuple[int | None, StoredFeatures | None]:
        """Return the highest stored boundary below this one, with its rows."""
        for shallower in range(min(boundary - 1, self.prefix.num_layers), -1, -1):
            stored = self.open(examples, shallower)
            if stored is not None:
                return shallower, stored
        return None, None

    def _forward(
        self,
        encoded: Encoded,
        rows: Indices,
        boundaries: Sequence[int],
        start: int | None = None,
        stored: StoredFeatures | None = None,
    ) -> dict[int, Tensor]:
        loader = SplitLoader(encoded, self.engine.device, self.engine.input_dtype)
        batch = loader.batch(rows) if stored is None else loader.extra_inputs(rows)
        features = None
        if stored is not None:
            features = as_tensor(stored.take(rows), stored.note).to(self.engine.device)
        with self.engine.autocast(), torch.no_grad():
            return self.prefix.compute(batch.inputs, boundaries, start, features)


def shortest_and_longest(encoded: Encoded) -> Indices:
    """Return two rows of a split, or one if it has no more."""
    return np.unique(np.argsort(encoded.lengths, kind="stable")[[0, -1]])


def shards(lengths: Indices) -> list[Indices]:
    """Return the rows of a split, longest first, in shards that one process computes at a time."""
    order = np.argsort(-lengths, kind="stable")
    return np.split(order, range(ROWS_PER_SHARD, len(order), ROWS_PER_SHARD))


def passes(lengths: Indices, rows: Indices, cost_of_pass: int) -> list[Indices]:
    """Divide a shard into forward passes of limited size with little padding, the longest rows first."""
    size = max(1, min(EXAMPLES_IN_PASS, TOKENS_IN_PASS // int(lengths[rows[0]])))
    cuts = cheapest_cuts(lengths[rows[::-1]], 1, size, cost_of_pass)
    return np.split(rows, [len(rows) - cut for cut in reversed(cuts)])


def open_store(recipe: Recipe) -> FeatureStore:
    """Return the machine's store of features; raises OSError if it cannot be opened."""
    budget = recipe.scale.cache_gigabytes
    return FeatureStore(cache_folder() / "features", None if budget == "auto" else int(budget * 1e9))


def open_shared(recipe: Recipe, store: FeatureStore, engine: Engine, leads_node: bool) -> SharedFeatures | None:
    """Return the features of all machines, if the recipe's runs are kept in an object store."""
    storage = recipe.scale.storage
    if not is_url(storage):
        return None
    remote = RemoteFolder(join(storage, "features"))
    return SharedFeatures(store, remote, downloads=leads_node, uploads=engine.rank == 0, agree=engine.agree)


def model_identity(recipe: Recipe, source: str, precision: str, engine: Engine) -> list[str]:
    """Return what the frozen blocks' output depends on, besides the examples."""
    seed = f"from scratch {recipe.train.seed}" if recipe.transfer.from_scratch else "pre-trained"
    adapter = recipe.transfer.adapter
    weights = [adapter.quantize] if adapter is not None and adapter.quantize is not None else []
    packages = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    return [source, seed, *weights, precision, str(engine.input_dtype), engine.device.type, *packages]
