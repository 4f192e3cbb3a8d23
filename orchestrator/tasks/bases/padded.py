"""Tensors of values of uneven length, one an example, padded to one shape so that `torch.func.vmap` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor


class Padded(NamedTuple):
    """Values of uneven length. A named tuple, because those are the nodes that vmap goes into."""

    values: Tensor
    """Shape [num_examples, longest, ...]."""
    lengths: Tensor
    """Values of each example; shape [num_examples]."""


def as_arrays(predictions: dict[str, Any]) -> dict[str, Any]:
    """Return a task's predictions as arrays, and those of uneven length as lists of arrays without padding."""
    return {name: _as_array(each) for name, each in predictions.items()}


def concatenate(parts: Sequence[Any]) -> Any:
    """Return the values of several batches as those of one: arrays, or lists of them."""
    return [value for part in parts for value in part] if isinstance(parts[0], list) else np.concatenate(parts)


def _as_array(value: Any) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
    if not isinstance(value, Padded):
        found: npt.NDArray[Any] = value.cpu().numpy()
        return found
    values, lengths = value.values.cpu().numpy(), value.lengths.cpu().numpy()
    return [np.asarray(row[:length]) for row, length in zip(values, lengths, strict=True)]
