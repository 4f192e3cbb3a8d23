"""Whether a run stores the output of its frozen blocks, and the splits as they are then fed to the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from orchestrator import models
from orchestrator.models import NoPrefix, Prefix
from orchestrator.models.attempt import CallFailed, attempt
from orchestrator.models.shortcuts.prefix import NotSeen
from orchestrator.models.shortcuts.token_pooling import evaluating, is_close
from orchestrator.tasks import Encoded
from orchestrator.training.assembling import Parts
from orchestrator.training.engine.base import Engine
from orchestrator.training.features.prefix_cache import PrefixCache, model_identity, open_shared, open_store
from orchestrator.training.loop import Schedule
from orchestrator.training.prepare import Prepared
from orchestrator.training.split_loader import SplitLoader

TRIED = (0.0, 0.1, 0.25)  # Examples on which a model's split is tried out, as shares of all by length: short ones.
CACHED_SPLITS = ("train", "select")  # *test* is read once, so storing it would save nothing.


def boundary_of(parts: Parts) -> int | None:
    """The freeze boundary in frozen layers (one more than there are with the tail); None where nothing is frozen."""
    depth = parts.frozen.depth
    # A pooler that the source lacks is trained with the head, though it is in the body.
    ends_body = depth.tail and not any(parameter.requires_grad for parameter in parts.body.parameters())
    return depth.num_layers + ends_body if depth.stem else None


def extract_prefix_at_boundary(prepared: Prepared, parts: Parts, schedule: Schedule) -> Prefix | NoPrefix | None:
    """Have the last layer compute only what the head reads, and make the frozen blocks replaceable by their output.

    Returns:
        Why they cannot be replaced, where it is wanted; None where nothing is frozen or wanted.
    """
    boundary = boundary_of(parts)
    is_asked = boundary is not None and is_wanted(prepared, parts, schedule, boundary)
    if prepared.recipe.scale.zero_stage == 3:
        return NoPrefix("ZeRO-3 spreads its weights over the workers") if is_asked else None
    encoded = prepared.encoded("train")
    loader, some = examples_to_try(encoded, parts)
    inputs, pooling = pick_position(parts, loader, some)
    if boundary is None or not is_asked:
        return None
    if encoded.rows_per_example > 1:
        return NoPrefix("an example is several texts")
    if encoded.augments:
        return NoPrefix("training examples are changed at random")
    beside = loader.extra_inputs(some).inputs
    return models.extract_prefix(parts.module, parts.body, parts.blocks, boundary, inputs, beside, pooling)


def examples_to_try(encoded: Encoded, parts: Parts) -> tuple[SplitLoader, npt.NDArray[np.int64]]:
    """A split on the model's device, and some of its rows."""
    order = np.argsort(encoded.lengths, kind="stable")
    some = np.unique(order[[int(share * (len(order) - 1)) for share in TRIED]])
    return SplitLoader(encoded, torch.device(parts.body.device)), some


def pick_position(
    parts: Parts, loader: SplitLoader, some: npt.NDArray[np.int64]
) -> tuple[dict[str, Tensor], models.TokenPooling | None]:
    """Have the last layer compute only what the head reads; returns the inputs that it was tried on too."""
    inputs = loader.batch(some).inputs
    pooling = models.find_token_pooling(parts.module, parts.blocks, inputs)
    if pooling is not None:
        models.pool_in_last_layer(parts.module, parts.blocks, inputs, pooling)
    return inputs, pooling


def can_pack(loader: SplitLoader, module: nn.Module) -> bool:
    """Whether the model keeps examples apart that stand in one row, tried out on a few."""
    if not (loader.encoded.packs and models.takes_packed_sequences(module)):
        return False
    order = np.argsort(loader.encoded.lengths, kind="stable")
    # The short ones share a row beside the longest.
    some = np.unique(order[[0, len(order) // 10, len(order) // 4, len(order) // 2]])
    found = []
    with torch.no_grad(), evaluating(module):
        for arrays in (loader.encoded.batch(some), loader.encoded.packed_batch(some)):
            inputs = {name: torch.from_numpy(values).to(loader.device) for name, values in arrays.inputs.items()}
            try:
                logits = attempt(module, inputs, "putting several examples in one row")
            except CallFailed:
                return False
            found.append(logits.sum((0, 1))[:1])
    return is_close(found[1], found[0])


def is_wanted(prepared: Prepared, parts: Parts, schedule: Schedule, boundary: int) -> bool:
    """Whether stored features are asked for, or save something: more than one pass over blocks that compute."""
    wanted = prepared.recipe.train.cache_prefix
    if wanted != "auto":
        return bool(wanted)
    computes = boundary > 0 or any(_multiplies(module) for module in parts.blocks.stem.modules)
    return computes and schedule.num_steps > schedule.order.steps_per_epoch


def make_loaders(
    prepared: Prepared,
    split: Prefix | NoPrefix | None,
    engine: Engine,
    precision: str,
    report_phase: Callable[[str], None],
    note: Callable[[str], None],
    boundaries: Sequence[int] = (),
    leads_node: bool = True,
) -> dict[str, SplitLoader]:
    """Every split as it is fed to the model: with stored features where there can be any.

    Args:
        tell: shows the phase; `note` keeps a sentence for the user.
        boundaries: others to store in the same pass, for later runs.
        leads_node: whether this worker does for its node what is done there once.
    """
    loaders = {name: SplitLoader(prepared.encoded(name), engine.device, engine.float_type) for name in prepared.tables}
    if split is None:
        return loaders
    # Machines that differ may find out different things, but all workers of a run do the same.
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
        engine.first_worker_does(lambda: note(f"the frozen blocks are computed in every epoch: {reason}"))
    return loaders


def open_cache(
    prepared: Prepared,
    prefix: Prefix,
    engine: Engine,
    precision: str,
    report_phase: Callable[[str], None],
    leads_node: bool,
) -> PrefixCache | str:
    """The cache of the frozen blocks' output; or why there is none."""
    identity = model_identity(prepared.recipe, prepared.identity["source"], precision, engine)
    try:
        store = open_store(prepared.recipe)
        shared = open_shared(prepared.recipe, store, engine, leads_node)
    except OSError as error:
        return _cannot_store(error)
    return PrefixCache(store, prefix, engine, identity, report_phase, shared)


def store_features(prepared: Prepared, cache: PrefixCache, boundaries: Sequence[int] = ()) -> dict[str, Any] | str:
    """The stored features of each split that is read often; or why there are none. All workers call this."""
    boundary = cache.prefix.boundary
    # Deeper blocks are trained here, so what they make of an example is not what other runs start from.
    wanted = sorted({*(each for each in boundaries if each < boundary), boundary})
    cache.download([prepared.keys[name] for name in CACHED_SPLITS], wanted)
    found = {}
    try:
        for name in CACHED_SPLITS:
            rows = cache.rows(prepared.keys[name], prepared.encoded(name), wanted)
            if isinstance(rows, str):
                return rows
            found[name] = rows[boundary]
    except (CallFailed, NotSeen) as error:
        return f"the model cannot be stopped between its blocks ({error})"
    except OSError as error:
        return _cannot_store(error)
    return found


def _cannot_store(error: OSError) -> str:
    return f"features cannot be stored: {error.strerror or error}"


def _multiplies(module: nn.Module) -> bool:
    """Whether a module costs more than reading its output from a disk would."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
