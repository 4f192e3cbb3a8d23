"""Compute in fp32 with weights that are stored in bf16 or fp16, converting one weight at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HALF = frozenset({torch.bfloat16, torch.float16})
_GET_DTYPE: Any = vars(torch._C.TensorBase)["dtype"].__get__


class Fp32ComputeMode(TorchFunctionMode):
    """Inside it, functions whose arguments are partly in bf16 or fp16 and partly in fp32 compute in fp32, embeddings
    return fp32, and the `dtype` of parameters in bf16 or fp16 is fp32, for models that read it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _GET_DTYPE:
            found = func(*args)
            return torch.float32 if found in _HALF and isinstance(args[0], nn.Parameter) else found
        if func is nn.functional.embedding:
            embedded = func(*args, **kwargs)
            return embedded.float() if embedded.dtype in _HALF else embedded
        dtypes = set(_dtypes((*args, *kwargs.values())))
        is_mixed = torch.float32 in dtypes and not _HALF.isdisjoint(dtypes)
        if is_mixed and not _needs_originals(func):
            copies: dict[int, Tensor] = {}
            args, kwargs = _to_fp32(args, copies), {name: _to_fp32(value, copies) for name, value in kwargs.items()}
            with _saving_originals(copies):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _needs_originals(func: Callable[..., Any]) -> bool:
    """Whether copies cannot replace the arguments of a function: it writes to them, or returns their gradients."""
    name = getattr(func, "__name__", "")
    writes = name in ("__set__", "__setitem__") or name[:3] == "__i" or (name[-1:] == "_" and name[-2:] != "__")
    return func is torch.autograd.grad or writes


def _dtypes(values: Iterable[Any]) -> Iterable[torch.dtype]:
    for value in values:
        if isinstance(value, Tensor):
            yield value.dtype
        elif isinstance(value, list | tuple):
            yield from _dtypes(value)


def _to_fp32(value: Any, copies: dict[int, Tensor]) -> Any:
    """Return a value with its tensors in fp32.

    Args:
        copies: the parameters that were copied are added to it, by the addresses of the copies.
    """
    if isinstance(value, Tensor):
        if value.dtype not in _HALF:
            return value
        copy = value.float()
        if isinstance(value, nn.Parameter):
            copies[copy.untyped_storage().data_ptr()] = value
        return copy
    if type(value) in (list, tuple):
        return type(value)(_to_fp32(each, copies) for each in value)
    return value


def _saving_originals(copies: dict[int, Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Save parameters instead of their copies for the backward pass, which converts them again.

    The copies of all weights together would take twice the memory of the model.

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
