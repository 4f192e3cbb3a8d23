"""Operators without values: results that depend on values, floating-point operations, and bytes moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
_ALLOCATIONS = {_ATEN.empty, _ATEN.empty_like, _ATEN.new_empty, _ATEN.empty_strided, _ATEN.new_empty_strided}


def run_operator(function: Any, args: Any, kwargs: Any, num_targets: int) -> Any:
    """Run an operator on tensors without values; where its result depends on values, return one of the right shape.

    Args:
        num_targets: how many places of each boolean mask count as true.
    """
    replacement = _REPLACEMENTS.get(function._overloadpacket)
    found = None if replacement is None else replacement(num_targets, *args, **kwargs)
    return function(*args, **kwargs) if found is None else found[0]


def count_operations(function: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Return the floating-point operations of an operator: two for a multiplication with addition, 0 for no product."""
    packet = function._overloadpacket
    if packet is _ATEN._grouped_mm:  # PyTorch's registry lacks it.
        return _operations_of_grouped_mm(*args[:2])
    return flop_registry[packet](*args, **kwargs, out_val=output) if packet in flop_registry else 0


def bytes_moved(function: Any, given: Any, output: Any) -> int:
    """Return the bytes that an operator reads and writes; 0 for views and allocations."""
    written = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
    if not written or function.is_view or function._overloadpacket in _ALLOCATIONS:
        return 0
    read = [each for each in tree_leaves(given) if isinstance(each, Tensor)]
    return sum(each.numel() * each.element_size() for each in (*read, *written))


def _read_scalar(num_targets: int, tensor: Tensor) -> tuple[Any] | None:
    # Models ask whether their masks mask nothing; with padding the answer is no.
    return (False,) if tensor.dtype == torch.bool else None


def _index(num_targets: int, tensor: Tensor, indices: Sequence[Tensor | None]) -> tuple[Tensor] | None:
    mask = indices[0] if indices else None
    if mask is None or mask.dtype != torch.bool:
        return None
    return (tensor.new_empty((num_targets, *tensor.shape[mask.ndim :])),)


def _put(num_targets: int, tensor: Tensor, indices: Sequence[Tensor | None], *_: Any) -> tuple[Tensor] | None:
    mask = indices[0] if indices else None
    return (tensor,) if mask is not None and mask.dtype == torch.bool else None


def _put_copy(num_targets: int, tensor: Tensor, indices: Sequence[Tensor | None], *rest: Any) -> tuple[Tensor] | None:
    found = _put(num_targets, tensor, indices, *rest)
    return None if found is None else (torch.empty_like(tensor),)


def _grouped_mm(
    num_targets: int, left: Tensor, right: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor]:
    """Multiply groups of rows (or columns) with a matrix each, as experts do. Fake tensors do so in bf16 alone."""
    shape: tuple[int, ...] = (left.shape[-2], right.shape[-1])
    if left.ndim == right.ndim:  # Of two matrices, the offsets cut the dimension that is summed over.
        assert left.ndim == 3 or offsets is not None
        shape = (left.shape[0] if left.ndim == 3 or offsets is None else offsets.shape[0], *shape)
    return (left.new_empty(shape),)


def _operations_of_grouped_mm(left: Tensor, right: Tensor) -> int:
    # Each row (or column) belongs to one group, however they are cut.
    groups = left.shape[0] if left.ndim == right.ndim == 3 else 1
    return 2 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1]


_REPLACEMENTS: dict[Any, Callable[..., tuple[Any] | None]] = {
    _ATEN._local_scalar_dense: _read_scalar,
    _ATEN.index: _index,
    _ATEN.index_put_: _put,
    _ATEN._index_put_impl_: _put,
    _ATEN.index_put: _put_copy,
    _ATEN._unsafe_index_put: _put_copy,
    _ATEN._grouped_mm: _grouped_mm,
}
