"""Score a split: every example once, however many workers share the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from orchestrator.data.batches import evaluation_batches
from orchestrator.data.cache import cached_table, content_key, find_cached_table
from orchestrator.tasks import Task
from orchestrator.tasks.base import Predictions, Totals
from orchestrator.tasks.bases.padded import as_arrays, concatenate
from orchestrator.training.engine.base import Engine
from orchestrator.training.split_loader import SplitLoader

Gathered = list[tuple[list[Any], list[Predictions], float]]
"""Rows, predictions and share of the loss of each worker."""
REFERENCE_VERSION = "reference 1"  # Part of each key: raise it when the same is computed otherwise.
EVALUATION_BATCH_FACTOR = 2  # Without gradients, twice the examples fit into the same memory.


@dataclass
class Scored:
    """A split's scores (on every worker) and its predictions in the split's order (on worker 0)."""

    metrics: dict[str, float]
    predictions: Predictions


def predict_rows(
    model: Any, task: Task, loader: SplitLoader, rows: np.ndarray[Any, Any], totals: Totals
) -> tuple[Predictions, float]:
    """Return the task's predictions for these rows, and their share of the loss (0 without labels)."""
    predictions, losses = predict_with_losses(model, task, loader, rows, [totals])
    return predictions, losses[0]


@torch.no_grad()
def predict_with_losses(
    model: Any, task: Task, loader: SplitLoader, rows: np.ndarray[Any, Any], totals: Sequence[Totals]
) -> tuple[Predictions, list[float]]:
    """Return the task's predictions for these rows, and their loss under each of the totals."""
    batch = loader.batch(rows)
    outputs = model(**batch.inputs)
    losses = [float(task.loss(outputs, batch, each)) if loader.encoded.is_labelled else 0.0 for each in totals]
    return as_arrays(task.predict(outputs, batch)), losses


def score(
    engine: Engine, task: Task, loader: SplitLoader, micro_batch_size: int, tokens_per_pass: int | None = None
) -> Scored:
    """Score a split over all workers; metrics hold `loss`, the mean over targets, and the task's own.

    All workers call this, and each takes part in every forward pass, for models that are sharded over them.

    Args:
        micro_batch_size: examples of a pass in training; here it is twice as many.
        tokens_per_pass: tokens of a pass in training, as in `Prepared`.
    """
    gathered = predict_share(engine, task, loader, micro_batch_size, tokens_per_pass)
    predictions: Predictions = {}

    def compute_metrics() -> dict[str, float]:
        predictions.update(in_order(gathered))
        loss = sum(share[2] for share in gathered)
        return {"loss": loss, **task.metrics(predictions, loader.encoded.targets())}

    return Scored(engine.run_on_first_worker(compute_metrics), predictions)


def predict_share(
    engine: Engine,
    task: Task,
    loader: SplitLoader,
    micro_batch_size: int,
    tokens_per_pass: int | None = None,
    predict: Callable[..., tuple[Any, Any]] = predict_rows,
) -> Gathered:
    """Predict this worker's share of a split; returns those of all workers, on worker 0.

    Args:
        predict: called as `predict_rows` for each batch; of several models at once it returns what holds theirs all.
    """
    engine.model.eval()
    rows, parts, total, totals = [], [], 0.0, loader.encoded.totals()
    batch_size, lengths = micro_batch_size * EVALUATION_BATCH_FACTOR, loader.lengths
    most = None if tokens_per_pass is None else tokens_per_pass * EVALUATION_BATCH_FACTOR
    most = loader.tokens_per_pass(most, lengths)
    for mine in evaluation_batches(lengths, batch_size, engine.num_workers, engine.rank, engine.cost_of_pass, most):
        asked = mine if len(mine) else np.zeros(1, dtype=np.int64)
        predictions, loss = predict(engine.model, task, loader, asked, totals)
        if len(mine):
            rows.append(mine)
            parts.append(predictions)
            total += loss
    gathered: Gathered = engine.gather((rows, parts, total))
    return gathered


def set_reference(
    engine: Engine,
    task: Task,
    loader: SplitLoader,
    micro_batch_size: int,
    identity: Sequence[str],
    tokens_per_pass: int | None = None,
) -> None:
    """Give the split the predictions of the model, not trained yet, for its examples. All workers call this.

    Args:
        identity: what that depends on. It is stored under this, and under how the examples are assigned: sums over
            other batches differ in their last bits.
    """
    limit = [] if tokens_per_pass is None else [tokens_per_pass]
    key = content_key(REFERENCE_VERSION, *identity, engine.num_workers, micro_batch_size, *limit)
    found = engine.run_on_first_worker(lambda: read_reference(key))
    if found is None:
        gathered = predict_share(engine, task, loader, micro_batch_size, tokens_per_pass)
        found = engine.run_on_first_worker(lambda: store_reference(key, gathered))
    loader.encoded.reference = found


def read_reference(key: str) -> np.ndarray[Any, Any] | None:
    """Return the predictions that are stored under a key; None where there are none."""
    kept = find_cached_table(key)
    return None if kept is None else np.stack([column.to_numpy() for column in kept], 1)


def store_reference(key: str, gathered: Gathered) -> np.ndarray[Any, Any]:
    """Store the predictions of all workers; return them in the order of the split."""
    found: np.ndarray[Any, Any]
    (found,) = in_order(gathered).values()
    table = pa.table({str(number): column for number, column in enumerate(found.T)})
    cached_table(key, lambda: table)
    return found


def in_order(gathered: Gathered) -> Predictions:
    """Return the predictions of all workers in the order of the split."""
    rows = np.concatenate([part for share in gathered for part in share[0]])
    order = np.argsort(rows, kind="stable")
    batches = [batch for share in gathered for batch in share[1]]
    found = {name: concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return {
        name: [values[row] for row in order] if isinstance(values, list) else values[order]
        for name, values in found.items()
    }
