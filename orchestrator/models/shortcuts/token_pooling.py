"""Heads that read one token: find that token, and compute only what it needs in the last layer.

Most classifiers read the first token or the last one. The other tokens then matter to the last layer only as keys and
values of its attention; queries, the output of attention and the feed-forward part are computed for one token instead
of all. The token and the modules are found by gradients, not by names, and the result is compared with that of the
whole layer before it is used.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from orchestrator.models.attempt import CallFailed, try_forward, try_gradients
from orchestrator.models.blocks import Block, Blocks
from orchestrator.models.shortcuts.forward import AroundForward, wrap_forward

logger = logging.getLogger(__name__)
FINDING = "finding the token that the head reads"
POOLING = "computing one token in the last layer"
TOLERANCE = 1e-4  # Relative. A wrong token differs by far more, sums in another order by far less.


@dataclass
class TokenPooling:
    """The only token of the last layer's output that the head reads."""

    position: Literal["first", "last"]
    """`last` is the last token of an example before its padding, which is on the right."""
    last: Tensor | None = None
    """The index of the last token of each example in the current batch; [batch]. None if nothing is padded."""

    def locate_last_tokens(self, inputs: dict[str, Any]) -> None:
        """Set the indices of the last tokens from the model's inputs."""
        mask = inputs.get("attention_mask")
        self.last = None if mask is None or self.position == "first" else mask.sum(-1) - 1

    def fits(self, values: Tensor, num_examples: int) -> bool:
        """Whether the first dimensions of `values` are examples and tokens. Some models order them differently."""
        if values.dim() < 2 or values.shape[0] != num_examples:
            return False
        return self.last is None or int(self.last.max()) < values.shape[1]

    def select(self, values: Tensor, dim: int = 1) -> Tensor:
        """Return the token of each example from `values`, whose dimension `dim` holds tokens; there it has size 1."""
        if self.position == "first" or values.stride(dim) == 0 or values.shape[dim] == 1:
            return values.narrow(dim, 0, 1)
        if self.last is None:
            return values.narrow(dim, values.shape[dim] - 1, 1)
        shape = [1] * values.dim()
        shape[0] = len(self.last)
        index = self.last.view(shape).expand(*values.shape[:dim], 1, *values.shape[dim + 1 :])
        return values.gather(dim, index)


def find_token_pooling(model: Any, blocks: Blocks, inputs: dict[str, Tensor]) -> TokenPooling | None:
    """Return the token of the last layer's output that the head reads; None if it reads several.

    Args:
        inputs: a few examples, uneven in length where their lengths differ, padded on the right.
    """
    found: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        # Not before: autograd would keep the intermediate results of all layers below.
        torch.set_grad_enabled(True)
        found.append((output if isinstance(output, Tensor) else output[0]).detach().requires_grad_())
        # A copy is passed on, because some models write into it.
        hidden = found[-1].clone()
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    hook = blocks.layers[-1].elements[-1].register_forward_hook(cut)
    try:
        with torch.no_grad(), eval_mode(model):
            logits = try_forward(model, inputs, FINDING)
            # There is no leaf where the model calls its layers without their hooks.
            gradient = try_gradients(logits, found, FINDING)[-1] if found else None
    except CallFailed:
        return None
    finally:
        hook.remove()
    if gradient is None or gradient.dim() != 3 or gradient.shape[1] < 2:
        return None
    return _match(_has_gradient(gradient), inputs)


def _has_gradient(gradient: Tensor) -> Tensor:
    """Return which tokens have a gradient; bool, [batch, tokens]."""
    return gradient.abs().sum(-1) > 0


def _match(read: Tensor, inputs: dict[str, Tensor]) -> TokenPooling | None:
    """Return the pooling that selects exactly the tokens that are read; None if there is none."""
    for position in ("first", "last"):
        pooling = TokenPooling(position)
        pooling.locate_last_tokens(inputs)
        if not pooling.fits(read, count_examples(inputs)):
            continue
        one = pooling.select(read[..., None].float()).sum()
        if read.sum() == len(read) == one:
            return pooling
    return None


def pool_in_last_layer(model: Any, blocks: Blocks, inputs: dict[str, Tensor], pooling: TokenPooling) -> bool:
    """Compute only what the pooled token needs in the last layer; return False, and change nothing, if outputs differ.

    The output of the layer then holds the values of that token at all positions.
    """
    layer = blocks.layers[-1]
    if len(layer.elements) != 1:
        return False
    element = layer.elements[0]
    undo = [model.register_forward_pre_hook(_locate_in(pooling), with_kwargs=True).remove]
    is_right = False
    with eval_mode(model), torch.no_grad(), contextlib.suppress(CallFailed):
        whole = try_forward(model, inputs, POOLING)
        late = _find_late_modules(model, element, inputs, pooling)
        undo += [wrap_forward(module, _token_function(pooling)) for module in late]
        # No mode is active where the backward pass computes a layer again, which has to compute the same.
        mode = contextlib.nullcontext() if _is_checkpointing(layer) else _OneQuery(pooling)
        undo.append(wrap_forward(element, _layer_function(pooling, mode)))
        # This fails if modules take another shape than [batch, tokens, width].
        is_right = is_close(try_forward(model, inputs, POOLING), whole)
        if not is_right:
            logger.info("%s: not possible, because the logits would not be the same", POOLING)
    if not is_right:
        for action in reversed(undo):
            action()
    return is_right


def _find_late_modules(
    model: Any, layer: nn.Module, inputs: dict[str, Tensor], pooling: TokenPooling
) -> list[nn.Module]:
    """Return the modules without children in a layer of whose output only the pooled token matters."""
    calls: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and output.dim() == 3:
            calls.append((module, output))

    def start_graph(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: kwargs[name].detach().requires_grad_()}

    leaves = [module for module in layer.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    hooks.append(layer.register_forward_pre_hook(start_graph, with_kwargs=True))
    try:
        with torch.enable_grad(), eval_mode(model):
            logits = try_forward(model, inputs, POOLING)
            gradients = try_gradients(logits, [output for _, output in calls], POOLING)
    finally:
        for hook in hooks:
            hook.remove()
    pooling.locate_last_tokens(inputs)
    late: dict[nn.Module, bool] = {}
    for (module, _), gradient in zip(calls, gradients, strict=True):
        is_late = gradient is not None and _matters_alone(_has_gradient(gradient), pooling, count_examples(inputs))
        late[module] = late.get(module, True) and is_late
    return [module for module, is_late in late.items() if is_late]


def count_examples(inputs: dict[str, Any]) -> int:
    return len(next(iter(inputs.values())))


def _matters_alone(read: Tensor, pooling: TokenPooling, num_examples: int) -> bool:
    """Whether the pooled token of each example has a gradient, and no other token."""
    if read.shape[1] < 2 or not pooling.fits(read, num_examples):
        return False
    # A token without a gradient may get one later: the zeros of a new adapter hide what is behind them.
    pooled = pooling.select(read[..., None].float())
    return bool(read.sum() == pooled.sum() == len(read))


def _locate_in(pooling: TokenPooling) -> Callable[..., None]:
    """Return a hook of the model that locates the last tokens of each batch."""

    def locate(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        pooling.locate_last_tokens(kwargs)

    return locate


def _token_function(pooling: TokenPooling) -> AroundForward:
    """Return a function around a module that computes the pooled token, and expands it to all positions."""

    def compute_token(module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        values = args[0]
        return original(pooling.select(values), *args[1:], **kwargs).expand(-1, values.shape[1], -1)

    return compute_token


def _layer_function(pooling: TokenPooling, mode: contextlib.AbstractContextManager[Any]) -> AroundForward:
    """Return a function around the last layer that runs it in `mode`, and expands the pooled token to all positions."""

    def compute_layer(module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with mode:
            output = original(*args, **kwargs)
        hidden = output if isinstance(output, Tensor) else output[0]
        # The residual sums at other positions are of no use, and must get no gradient.
        hidden = pooling.select(hidden).expand(-1, hidden.shape[1], -1)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    return compute_layer


def _is_checkpointing(layer: Block) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in layer.modules)


class _OneQuery(TorchFunctionMode):
    """Inside it, attention is computed for the query of the pooled token only."""

    def __init__(self, pooling: TokenPooling) -> None:
        super().__init__()
        self.pooling = pooling

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, *others = args
        num_positions = query.shape[2]
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.shape[2] > 1:
            # One mask may serve all examples or heads, while the token differs by example.
            mask = self.pooling.select(mask.expand(query.shape[0], *mask.shape[1:]), dim=2)
        is_causal = kwargs.get("is_causal", False)
        if is_causal and self.pooling.position == "last":
            # `is_causal` would treat the single query as that of the first token. It reads all tokens up to its own.
            mask = None if self.pooling.last is None else _mask_up_to(self.pooling.last, others[0].shape[2])
            is_causal = False
        changed = {**kwargs, "attn_mask": mask, "is_causal": is_causal}
        return func(self.pooling.select(query, dim=2), *others, **changed).expand(-1, -1, num_positions, -1)


def _mask_up_to(last: Tensor, num_positions: int) -> Tensor:
    """Return a mask of the tokens up to the last one of each example; bool, [batch, 1, 1, tokens]."""
    return (torch.arange(num_positions, device=last.device) <= last[:, None])[:, None, None]


def is_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors are equal, but for differences from sums in another order."""
    # Relative to the largest value: the logits of a new head are small, and so are differences that matter.
    scale = float(expected.detach().abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of every module afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
