"""The batches of a split: its examples, or stored features of the frozen blocks in their place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.data.feature_store import StoredFeatures
from orchestrator.models.shortcuts.prefix import FEATURES
from orchestrator.tasks import Encoded
from orchestrator.tasks.base import Arrays, Batch


@dataclass
class SplitLoader:
    """A split, as batches of tensors on the device."""

    encoded: Encoded
    device: torch.device
    input_dtype: torch.dtype | None = None
    """What floating inputs are turned into; None leaves them."""
    features: StoredFeatures | None = None
    """Stored output of the frozen blocks, one row an example."""
    packs: bool = False
    """Whether training batches hold several examples in one row."""

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def is_even(self) -> bool:
        """Whether the features of each example have the same shape, most often that of one vector."""
        return self.features is not None and self.features.layout.lengths is None

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The padded positions of each example; 1 where features are even and none is padded."""
        return np.ones(len(self), np.int64) if self.is_even else self.encoded.lengths

    def batch(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...] | None = None) -> Batch:
        """Return these rows, with targets where the split has them.

        Args:
            stream: seed and epoch of what is drawn for training examples; None where nothing is.
        """
        packs = self.packs and stream is not None
        if packs:
            batch = self._to_device(self.encoded.packed_batch(rows))
        elif self.features is None:
            batch = self._to_device(self.encoded.batch(rows, stream))
        else:
            batch = self.extra_inputs(rows)
        if self.features is not None:
            values = self.features.join(rows) if packs else self.features.take(rows)
            batch.inputs[FEATURES] = as_tensor(values, self.features.note).to(self.device, non_blocking=True)
        return batch

    def tokens_per_pass(self, most: int | None, lengths: npt.NDArray[np.int64]) -> int | None:
        """Return a limit of tokens in the unit of the lengths that a pass is cut by: features may have one position."""
        if most is None or lengths is self.encoded.lengths:
            return most
        return max(1, most // int(self.encoded.lengths.max()))

    def extra_inputs(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return what the model needs of these rows besides features: masks, targets."""
        return self._to_device(self.encoded.extra_inputs(rows))

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(self._tensors(batch.inputs, self.input_dtype), self._tensors(batch.targets))

    def _tensors(self, arrays: Arrays, input_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        tensors = {name: torch.from_numpy(values).to(self.device, non_blocking=True) for name, values in arrays.items()}
        if input_dtype is None:
            return tensors
        return {name: each.to(input_dtype) if each.is_floating_point() else each for name, each in tensors.items()}


def as_array(values: Tensor) -> tuple[npt.NDArray[np.generic], str]:
    """Return a tensor as a NumPy array, and the name of its dtype: NumPy has no bf16."""
    name = str(values.dtype).removeprefix("torch.")
    values = values.contiguous()
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).cpu().numpy(), name


def as_tensor(values: npt.NDArray[np.generic], name: str) -> Tensor:
    """Return the tensor of an array; the reverse of `as_array`."""
    return torch.from_numpy(values).view(getattr(torch, name))
