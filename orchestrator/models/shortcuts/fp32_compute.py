"""A model whose weights are held in bf16 or fp16, computing as if they were in fp32, one widened at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_NARROW = frozenset({torch.bfloat16, torch.float16})
_ASKED_FOR_FORMAT: Any = vars(torch._C.TensorBase)["dtype"].__get__


class Fp32ComputeMode(TorchFunctionMode):
    """Inside it, functions that are given bf16 or fp16 beside fp32 compute in fp32, embeddings are looked up in fp32,
    and parameters in bf16 or fp16 say that they are in fp32, for models that ask them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _ASKED_FOR_FORMAT:
            found = func(*args)
            return torch.float32 if found in _NARROW and isinstance(args[0], nn.Parameter) else found
        if func is nn.functional.embedding:
            looked_up = func(*args, **kwargs)
            return looked_up.float() if looked_up.dtype in _NARROW else looked_up
        formats = set(_formats((*args, *kwargs.values())))
        is_mixed = torch.float32 in formats and not _NARROW.isdisjoint(formats)
        if is_mixed and not _needs_the_very_tensors(func):
            copies: dict[int, Tensor] = {}
            args, kwargs = _widened(args, copies), {name: _widened(value, copies) for name, value in kwargs.items()}
            with _saved_as_stored(copies):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _needs_the_very_tensors(func: Callable[..., Any]) -> bool:
    """Whether no wider copy may take a tensor's place: it is written to, or has a gradient asked of it."""
    name = getattr(func, "__name__", "")
    writes = name in ("__set__", "__setitem__") or name[:3] == "__i" or (name[-1:] == "_" and name[-2:] != "__")
    return func is torch.autograd.grad or writes


def _formats(values: Iterable[Any]) -> Iterable[torch.dtype]:
    for value in values:
        if isinstance(value, Tensor):
            yield value.dtype
        elif isinstance(value, list | tuple):
            yield from _formats(value)


def _widened(value: Any, copies: dict[int, Tensor]) -> Any:
    """A value with its tensors in fp32.

    Args:
        copies: gets the parameters that were copied, by the addresses of the copies.
    """
    if isinstance(value, Tensor):
        if value.dtype not in _NARROW:
            return value
        wide = value.float()
        if isinstance(value, nn.Parameter):
            copies[wide.untyped_storage().data_ptr()] = value
        return wide
    if type(value) in (list, tuple):
        return type(value)(_widened(each, copies) for each in value)
    return value


def _saved_as_stored(copies: dict[int, Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Have the backward pass widen weights once more: the copies of a whole model would take twice its memory.

    Args:
        copies: parameters, by the addresses of their copies.
    """

    def pack(saved: Tensor) -> Any:
        stored = copies.get(saved.untyped_storage().data_ptr())
        return saved if stored is None else (stored, saved.size(), saved.stride(), saved.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        stored, *layout = packed
        return torch.as_strided(stored.detach().float(), *layout)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
