"""Decide whether a run stores the output of its frozen blocks, and load the splits accordingly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from orchestrator import models
from orchestrator.models import Prefix, PrefixUnavailable
from orchestrator.models.attempt import CallFailed, try_forward
from orchestrator.models.shortcuts.prefix import BoundaryNotReached
from orchestrator.models.shortcuts.token_pooling import eval_mode, is_close
from orchestrator.recipe import Recipe
from orchestrator.tasks import Encoded
from orchestrator.training.assembling import ModelParts
from orchestrator.training.engine.base import Engine
from orchestrator.training.features.prefix_cache import PrefixCache, model_identity, open_shared, open_store
from orchestrator.training.loop import Schedule
from orchestrator.training.prepare import Prepared
from orchestrator.training.split_loader import SplitLoader

TRIED = (0.0, 0.1, 0.25)  # Ranks by length, as shares of all examples, of those used for trying shortcuts: short ones.
CACHED_SPLITS = ("train", "select")  # *test* is read once, so storing it would save nothing.


def boundary_of(parts: ModelParts) -> int | None:
    """Return the freeze boundary in frozen layers (one more than all with the tail); None if nothing is frozen."""
    depth = parts.frozen.depth
    # A pooler that the source lacks is trained with the head, though it is in the body.
    ends_body = depth.tail and not any(parameter.requires_grad for parameter in parts.body.parameters())
    return depth.num_layers + ends_body if depth.stem else None


def extract_prefix_at_boundary(
    prepared: Prepared, parts: ModelParts, schedule: Schedule
) -> Prefix | PrefixUnavailable | None:
    """Compute only what the head reads in the last layer, and prepare to replace the frozen blocks by their output.

    Returns:
        The prefix; the reason why there is none although it is wanted; None if nothing is frozen or wanted.
    """
    boundary = boundary_of(parts)
    is_asked = boundary is not None and is_wanted(prepared, parts, schedule, boundary)
    encoded = prepared.encoded("train")
    reason = why_not_replaceable(prepared.recipe, encoded)
    if prepared.recipe.scale.zero_stage == 3:
        return PrefixUnavailable(str(reason)) if is_asked else None
    loader, some = examples_to_try(encoded, parts)
    inputs, pooling = use_token_pooling(parts, loader, some)
    if boundary is None or not is_asked:
        return None
    if reason is not None:
        return PrefixUnavailable(reason)
    beside = loader.extra_inputs(some).inputs
    return models.extract_prefix(parts.module, parts.body, parts.blocks, boundary, inputs, beside, pooling)


def why_not_replaceable(recipe: Recipe, encoded: Encoded) -> str | None:
    """Return why stored features cannot take the frozen blocks' place, by recipe and data; None where they may."""
    if recipe.scale.zero_stage == 3:
        return "ZeRO-3 spreads its weights over the workers"
    if encoded.rows_per_example > 1:
        return "an example is several texts"
    return "training examples are changed at random" if encoded.augments else None


def examples_to_try(encoded: Encoded, parts: ModelParts) -> tuple[SplitLoader, npt.NDArray[np.int64]]:
    """Return a split on the model's device, and some of its rows."""
    order = np.argsort(encoded.lengths, kind="stable")
    some = np.unique(order[[int(share * (len(order) - 1)) for share in TRIED]])
    return SplitLoader(encoded, torch.device(parts.body.device)), some


def use_token_pooling(
    parts: ModelParts, loader: SplitLoader, some: npt.NDArray[np.int64]
) -> tuple[dict[str, Tensor], models.TokenPooling | None]:
    """Compute only what the head reads in the last layer; return the inputs used to try that, and the pooling."""
    inputs = loader.batch(some).inputs
    pooling = models.find_token_pooling(parts.module, parts.blocks, inputs)
    if pooling is not None:
        models.pool_in_last_layer(parts.module, parts.blocks, inputs, pooling)
    return inputs, pooling


def can_pack(loader: SplitLoader, module: nn.Module) -> bool:
    """Whether the model computes examples independently that are packed into one row, tried on a few."""
    if not (loader.encoded.packs and models.takes_packed_sequences(module)):
        return False
    order = np.argsort(loader.encoded.lengths, kind="stable")
    # The short ones are packed into one row, the longest is in another.
    some = np.unique(order[[0, len(order) // 10, len(order) // 4, len(order) // 2]])
    found = []
    with torch.no_grad(), eval_mode(module):
        for arrays in (loader.encoded.batch(some), loader.encoded.packed_batch(some)):
            inputs = {name: torch.from_numpy(values).to(loader.device) for name, values in arrays.inputs.items()}
            try:
                logits = try_forward(module, inputs, "packing several examples into one row")
            except CallFailed:
                return False
            found.append(logits.sum((0, 1))[:1])
    return is_close(found[1], found[0])


def is_wanted(prepared: Prepared, parts: ModelParts, schedule: Schedule, boundary: int) -> bool:
    """Whether the recipe asks for stored features, or they save time: several passes over blocks that compute."""
    wanted = prepared.recipe.train.cache_prefix
    if wanted != "auto":
        return bool(wanted)
    computes = boundary > 0 or any(_multiplies(module) for module in parts.blocks.stem.modules)
    return computes and schedule.num_steps > schedule.order.steps_per_epoch


def make_loaders(
    prepared: Prepared,
    split: Prefix | PrefixUnavailable | None,
    engine: Engine,
    precision: str,
    report_phase: Callable[[str], None],
    note: Callable[[str], None],
    boundaries: Sequence[int] = (),
    leads_node: bool = True,
) -> dict[str, SplitLoader]:
    """Return the loader of every split, with stored features where they can be used.

    Args:
        report_phase: shows the current phase.
        note: records a sentence for the user.
        boundaries: further boundaries to store in the same pass, for later runs.
        leads_node: whether this worker does what is done once per node.
    """
    loaders = {name: SplitLoader(prepared.encoded(name), engine.device, engine.input_dtype) for name in prepared.tables}
    if split is None:
        return loaders
    # Different machines may come to different results, but all workers of a run must do the same.
    cache = (
        open_cache(prepared, split, engine, precision, report_phase, leads_node)
        if isinstance(split, Prefix)
        else split.reason
    )
    reason = engine.agree(cache if isinstance(cache, str) else None)
    if isinstance(cache, PrefixCache) and reason is None:
        found = store_features(prepared, cache, boundaries)
        reason = engine.agree(found if isinstance(found, str) else None)
        if reason is None and not isinstance(found, str):
            for name, rows in found.items():
                loaders[name].features = rows
    if reason is not None:
        engine.run_on_first_worker(lambda: note(f"the frozen blocks are computed in every epoch: {reason}"))
    return loaders


def open_cache(
    prepared: Prepared,
    prefix: Prefix,
    engine: Engine,
    precision: str,
    report_phase: Callable[[str], None],
    leads_node: bool,
) -> PrefixCache | str:
    """Return the cache of the frozen blocks' output; or why there is none."""
    identity = model_identity(prepared.recipe, prepared.identity["source"], precision, engine)
    try:
        store = open_store(prepared.recipe)
        shared = open_shared(prepared.recipe, store, engine, leads_node)
    except OSError as error:
        return _cannot_store(error)
    return PrefixCache(store, prefix, engine, identity, report_phase, shared)


def store_features(prepared: Prepared, cache: PrefixCache, boundaries: Sequence[int] = ()) -> dict[str, Any] | str:
    """Return the stored features of each split that is read often; or why there are none. All workers call this."""
    boundary = cache.prefix.boundary
    # Blocks above it are trained here, so other runs cannot start from their output.
    wanted = sorted({*(each for each in boundaries if each < boundary), boundary})
    cache.download([prepared.keys[name] for name in CACHED_SPLITS], wanted)
    found = {}
    try:
        for name in CACHED_SPLITS:
            rows = cache.rows(prepared.keys[name], prepared.encoded(name), wanted)
            if isinstance(rows, str):
                return rows
            found[name] = rows[boundary]
    except (CallFailed, BoundaryNotReached) as error:
        return f"the model cannot be stopped between its blocks ({error})"
    except OSError as error:
        return _cannot_store(error)
    return found


def _cannot_store(error: OSError) -> str:
    return f"features cannot be stored: {error.strerror or error}"


def _multiplies(module: nn.Module) -> bool:
    """Whether running a module takes longer than reading its output from a disk."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
