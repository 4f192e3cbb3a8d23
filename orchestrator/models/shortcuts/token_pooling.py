"""A head that reads one position: which one, and a last layer that computes only what that position needs.

Classifiers mostly read the first token or the last one. In the last layer the other positions then matter only through
what attention reads of them (keys and values); queries, attention's output and the feed-forward part are computed for
one position instead of all. Position and parts are found by gradients, not by names, and the result is compared with
the whole layer's before it is used.
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

logger = logging.getLogger(__name__)
FINDING = "finding the position that the head reads"
PICKING = "computing one position in the last layer"
TOLERANCE = 1e-4  # Relative; a wrong position is off by far more, another order of sums by far less.


@dataclass
class TokenPooling:
    """The one position of the last layer's output that the head reads."""

    position: Literal["first", "last"]
    """`last` is an example's last token that is no padding; padding is on the right."""
    last: Tensor | None = None
    """Where that is in the current batch; shape [batch]. None where nothing is padded."""

    def locate_last_tokens(self, inputs: dict[str, Any]) -> None:
        """Find the position in a batch, from the model's inputs."""
        mask = inputs.get("attention_mask")
        self.last = None if mask is None or self.position == "first" else mask.sum(-1) - 1

    def fits(self, values: Tensor, num_examples: int) -> bool:
        """Whether the axes of values begin with examples and positions; some models have them in another order."""
        if values.dim() < 2 or values.shape[0] != num_examples:
            return False
        return self.last is None or int(self.last.max()) < values.shape[1]

    def take(self, values: Tensor, axis: int = 1) -> Tensor:
        """The position of each example, as an axis of length 1; `values` is [batch, ..., positions at `axis`, ...]."""
        if self.position == "first" or values.stride(axis) == 0 or values.shape[axis] == 1:
            return values.narrow(axis, 0, 1)
        if self.last is None:
            return values.narrow(axis, values.shape[axis] - 1, 1)
        shape = [1] * values.dim()
        shape[0] = len(self.last)
        index = self.last.view(shape).expand(*values.shape[:axis], 1, *values.shape[axis + 1 :])
        return values.gather(axis, index)


def find_token_pooling(model: Any, blocks: Blocks, inputs: dict[str, Tensor]) -> TokenPooling | None:
    """The position that the head reads of the last layer's output; None where it reads several.

    Args:
        inputs: a few examples, uneven in length where their lengths differ, padded on the right.
    """
    found: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        # Only from here on: what the layers below compute would all be kept for gradients.
        torch.set_grad_enabled(True)
        found.append((output if isinstance(output, Tensor) else output[0]).detach().requires_grad_())
        # A copy goes on, because some models write into it.
        hidden = found[-1].clone()
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    hook = blocks.layers[-1].elements[-1].register_forward_hook(cut)
    try:
        with torch.no_grad(), eval_mode(model):
            logits = try_forward(model, inputs, FINDING)
            # Layers that are called without their hooks tell nothing.
            gradient = try_gradients(logits, found, FINDING)[-1] if found else None
    except CallFailed:
        return None
    finally:
        hook.remove()
    if gradient is None or gradient.dim() != 3 or gradient.shape[1] < 2:
        return None
    return _match(_read_positions(gradient), inputs)


def _read_positions(gradient: Tensor) -> Tensor:
    """Which positions have a gradient; shape [batch, positions]."""
    return gradient.abs().sum(-1) > 0


def _match(read: Tensor, inputs: dict[str, Tensor]) -> TokenPooling | None:
    for position in ("first", "last"):
        pooling = TokenPooling(position)
        pooling.locate_last_tokens(inputs)
        if not pooling.fits(read, count_examples(inputs)):
            continue
        one = pooling.take(read[..., None].float()).sum()
        if read.sum() == len(read) == one:
            return pooling
    return None


def pool_in_last_layer(model: Any, blocks: Blocks, inputs: dict[str, Tensor], pooling: TokenPooling) -> bool:
    """Have the last layer compute only what the picked position needs; False where that changes the outputs.

    Its output holds the picked position's values at all positions.
    """
    layer = blocks.layers[-1]
    if len(layer.elements) != 1:
        return False
    element = layer.elements[0]
    undo = [model.register_forward_pre_hook(_look(pooling), with_kwargs=True).remove]
    is_right = False
    with eval_mode(model), torch.no_grad(), contextlib.suppress(CallFailed):
        whole = try_forward(model, inputs, PICKING)
        late = _find_late_modules(model, element, inputs, pooling)
        undo += [_replace(module, _late_function(pooling)) for module in late]
        # A layer that is computed again in the backward pass is computed without modes, and has to do the same.
        mode = contextlib.nullcontext() if _is_checkpointing(layer) else _OneQuery(pooling)
        undo.append(_replace(element, _layer_function(pooling, mode)))
        # Fails where modules take something else than [batch, positions, width].
        is_right = is_close(try_forward(model, inputs, PICKING), whole)
        if not is_right:
            logger.info("%s: not possible, because the logits would not be the same", PICKING)
    if not is_right:
        for action in reversed(undo):
            action()
    return is_right


def _find_late_modules(
    model: Any, layer: nn.Module, inputs: dict[str, Tensor], pooling: TokenPooling
) -> list[nn.Module]:
    """Modules without parts inside a layer whose output matters at the picked position alone."""
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
            logits = try_forward(model, inputs, PICKING)
            gradients = try_gradients(logits, [output for _, output in calls], PICKING)
    finally:
        for hook in hooks:
            hook.remove()
    pooling.locate_last_tokens(inputs)
    late: dict[nn.Module, bool] = {}
    for (module, _), gradient in zip(calls, gradients, strict=True):
        is_late = gradient is not None and _is_picked_alone(_read_positions(gradient), pooling, count_examples(inputs))
        late[module] = late.get(module, True) and is_late
    return [module for module, is_late in late.items() if is_late]


def count_examples(inputs: dict[str, Any]) -> int:
    return len(next(iter(inputs.values())))


def _is_picked_alone(read: Tensor, pooling: TokenPooling, num_examples: int) -> bool:
    if read.shape[1] < 2 or not pooling.fits(read, num_examples):
        return False
    # No gradient tells nothing: what a new adapter's zeros hide now will matter as soon as they have learned.
    picked = pooling.take(read[..., None].float())
    return bool(read.sum() == picked.sum() == len(read))


def _look(pooling: TokenPooling) -> Callable[..., None]:
    """A hook of the model that tells the pick where the position is in each batch."""

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        pooling.locate_last_tokens(kwargs)

    return look


def _late_function(pooling: TokenPooling) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        values = args[0]
        return original(pooling.take(values), *args[1:], **kwargs).expand(-1, values.shape[1], -1)

    return forward


def _layer_function(pooling: TokenPooling, mode: contextlib.AbstractContextManager[Any]) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with mode:
            output = original(*args, **kwargs)
        hidden = output if isinstance(output, Tensor) else output[0]
        # What the residual sums hold at other positions is of no use, and must have no gradient.
        hidden = pooling.take(hidden).expand(-1, hidden.shape[1], -1)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    return forward


def _is_checkpointing(layer: Block) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in layer.modules)


class _OneQuery(TorchFunctionMode):
    """Attention for the picked position's query only."""

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
            # A mask may be one for all examples or all heads; what is picked differs by example.
            mask = self.pooling.take(mask.expand(query.shape[0], *mask.shape[1:]), axis=2)
        is_causal = kwargs.get("is_causal", False)
        if is_causal and self.pooling.position == "last":
            # Its single query would be taken for the first position's: said by a mask, it reads all up to its own.
            mask = None if self.pooling.last is None else _read_by(self.pooling.last, others[0].shape[2])
            is_causal = False
        changed = {**kwargs, "attn_mask": mask, "is_causal": is_causal}
        return func(self.pooling.take(query, axis=2), *others, **changed).expand(-1, -1, num_positions, -1)


def _read_by(last: Tensor, num_positions: int) -> Tensor:
    """The positions up to each example's last; shape [batch, 1, 1, positions]."""
    return (torch.arange(num_positions, device=last.device) <= last[:, None])[:, None, None]


def _replace(module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Put a function around a module's forward; returns what takes it away again."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(original, args, kwargs)

    module.forward = forward

    def undo() -> None:
        del module.forward

    return undo


def is_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two ways to the same numbers agree, as far as another order of sums lets them."""
    # Against the size of the logits themselves: those of a new head are small, and so are differences that matter.
    scale = float(expected.detach().abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, every module's mode put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
