"""Running statistics of norms: their momentum in tuned norms, and norms that keep theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

LOWEST_MOMENTUM, HIGHEST_MOMENTUM = 0.01, 0.1
UPDATES_TO_FORGET = 3.0
"""After this many times 1 / momentum updates, 5 % of the earlier statistics are left."""


def set_batch_norm_momentum(model: nn.Module, num_updates: int) -> str | None:
    """Set a momentum of tuned batch norms that fits the run; return a sentence about changed ones, or None.

    The momentum is the share of the last batch in the running statistics, which evaluation uses. With a high one they
    follow the last batch: in TensorFlow the word has the opposite meaning, so models converted from it have 0.997 and
    more. With a low one they stay those of the source in a short run, while the weights change. In between the model's
    own momentum is kept. None, an average over all batches of the source, is too low for any run.

    Args:
        num_updates: training passes between two evaluations.
    """
    fitting = min(HIGHEST_MOMENTUM, max(LOWEST_MOMENTUM, UPDATES_TO_FORGET / max(1, num_updates)))
    changed = [
        norm
        for norm in running_norms(model)
        if norm.momentum is None or not fitting <= norm.momentum <= HIGHEST_MOMENTUM
    ]
    before = sorted({str(norm.momentum) for norm in changed if _is_tuned(norm)})
    for norm in changed:
        norm.momentum = fitting
    if not before:
        return None
    return (
        f"tuned batch norms have a momentum of {fitting:.2g} instead of the model's {', '.join(before)}, "
        "so that their running statistics fit what is trained; frozen ones keep their statistics"
    )


def running_norms(model: nn.Module) -> Iterator[Any]:
    """Yield batch norms of all kinds, and instance norms, that keep running statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            yield module


def frozen_norms(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return norms whose parameters are not trained, as under an adapter: the export has the source's statistics."""
    return tuple(norm for norm in running_norms(model) if not _is_tuned(norm))


def _is_tuned(norm: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in norm.parameters(recurse=False))
