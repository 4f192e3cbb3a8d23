"""Find out whether stored output can replace the frozen blocks of a model, by a comparison with the whole model.

It can in most models, and none is trusted without the comparison: where layers pass on more than hidden states, or the
outputs with features differ from those of the whole model, no features are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.models.attempt import CallFailed, try_forward, try_gradients
from orchestrator.models.blocks import Block, Blocks
from orchestrator.models.shortcuts.forward import wrap_forward
from orchestrator.models.shortcuts.prefix import (
    FEATURES,
    BoundaryNotReached,
    OutputSpec,
    Prefix,
    hidden_of,
    with_hidden,
)
from orchestrator.models.shortcuts.token_pooling import TokenPooling, count_examples, eval_mode, is_close

MORE_THAN_HIDDEN = "its layers pass on more than hidden states"
NO_ROWS = "the output of its layers does not have one row for each example"
ATTEMPT = "using the stored output of the frozen blocks"


@dataclass(frozen=True)
class PrefixUnavailable:
    """The reason why stored output cannot replace the frozen blocks of a model."""

    reason: str


def extract_prefix(
    model: Any,
    body: Any,
    blocks: Blocks,
    boundary: int,
    inputs: dict[str, Tensor],
    extra_inputs: dict[str, Tensor],
    pooling: TokenPooling | None,
) -> Prefix | PrefixUnavailable:
    """Prepare a model so that stored output can replace the blocks below a boundary.

    Both ways are compared on `inputs`: the model must return the same with features as without.

    Args:
        model: the model that is called, which may be a `PeftModel`.
        body: the model's `base_model`, without its head.
        boundary: number of frozen layers; the number of layers plus one where the tail is frozen too.
        inputs: the model's inputs for a few examples of uneven length.
        extra_inputs: those of them that are passed together with features.
        pooling: the token that the head reads, if it reads only one.

    Returns:
        The prefix; or why there is none, with the model restored.
    """
    try:
        stem = _find_replaceable(model, blocks, inputs)
    except CallFailed as error:
        return PrefixUnavailable(f"{MORE_THAN_HIDDEN} ({error.reason})")
    prefix = Prefix(model, body, blocks, boundary, pooling, stem)
    reason = _compare(prefix, inputs, extra_inputs)
    if reason is None:
        return prefix
    prefix.remove()
    return PrefixUnavailable(reason)


def _find_replaceable(model: Any, blocks: Blocks, inputs: dict[str, Tensor]) -> list[nn.Module]:
    """Return the modules of the stem that only the hidden states of the first layer depend on.

    The others, such as a norm of relative positions that all layers read, have to run in every pass.
    """
    parts = [
        module
        for module in _outermost(blocks.stem)
        if any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList)
    ]
    outputs: list[tuple[nn.Module, Tensor]] = []

    def cut_output(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        outputs.append((module, hidden.detach().requires_grad_()))
        return OutputSpec.of(output).rebuild(outputs[-1][1].clone())

    def cut_hidden(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return with_hidden(args, kwargs, hidden_of(args, kwargs).detach())

    hooks = [module.register_forward_hook(cut_output) for module in parts]
    hooks.append(blocks.layers[0].elements[0].register_forward_pre_hook(cut_hidden, with_kwargs=True))
    try:
        with torch.enable_grad(), eval_mode(model):
            logits = try_forward(model, inputs, ATTEMPT)
            gradients = try_gradients(logits, [start for _, start in outputs], ATTEMPT)
    finally:
        for hook in hooks:
            hook.remove()
    read = {module for (module, _), gradient in zip(outputs, gradients, strict=True) if gradient is not None}
    return [module for module in parts if module not in read]


def _compare(prefix: Prefix, inputs: dict[str, Tensor], extra_inputs: dict[str, Tensor]) -> str | None:
    """Return why the model does not return the same with features as without; None if it does."""
    model, boundary = prefix.model, prefix.boundary
    try:
        with eval_mode(model), torch.no_grad():
            with torch.enable_grad():
                whole = try_forward(model, inputs, ATTEMPT)
            if boundary > prefix.num_layers:
                prefix.head_input = _find_head_input(model, prefix, inputs)
                if prefix.head_input is None:
                    return "its head reads more than one output of its body"
            features = prefix.compute(inputs, [boundary])[boundary]
            if not (isinstance(features, Tensor) and features.shape[:1] == (count_examples(inputs),)):
                return NO_ROWS
            features = as_stored(features, extra_inputs)
            # Fewer examples than before: what a layer returns besides hidden states fits only the batch it came from.
            some = max(1, len(features) - 1)
            given = {name: value[:some] for name, value in extra_inputs.items()}
            with torch.enable_grad():
                fed = try_forward(model, {**given, FEATURES: features[:some]}, ATTEMPT)
            reached = [_trained_with_gradient(logits, model) for logits in (whole, fed)]
    except CallFailed as error:
        return f"{MORE_THAN_HIDDEN} ({error.reason})"
    except BoundaryNotReached as error:
        return str(error)
    if reached[0] != reached[1]:
        return "its frozen blocks depend on a trained parameter"
    return None if is_close(fed, whole[:some]) else MORE_THAN_HIDDEN


def as_stored(features: Tensor, extra_inputs: dict[str, Tensor]) -> Tensor:
    """Return features as they are read from storage, with zeros at padding: some heads read the values there."""
    mask = extra_inputs.get("attention_mask")
    if mask is None or features.dim() != 3 or features.shape[:2] != mask.shape:
        return features
    return features * mask[..., None].to(features.dtype)


def _trained_with_gradient(logits: Tensor, model: nn.Module) -> list[bool]:
    """Return which of the trained parameters get a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [gradient is not None for gradient in try_gradients(logits, trained, ATTEMPT)]


def _find_head_input(model: Any, prefix: Prefix, inputs: dict[str, Tensor]) -> str | None:
    """Return the name of the part of the body's output that the logits depend on; None if it is not exactly one."""
    try_forward(model, inputs, ATTEMPT)
    output = prefix.body_output
    if not isinstance(output, dict):  # The body was not called, or returns a tuple.
        return None
    parts = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}
    leaves = {name: value.detach().requires_grad_() for name, value in parts.items()}
    remove = wrap_forward(prefix.body, lambda *_: type(output)(**{**output, **leaves}))
    try:
        with torch.enable_grad():
            logits = try_forward(model, inputs, ATTEMPT)
            gradients = try_gradients(logits, list(leaves.values()), ATTEMPT)
    finally:
        remove()
    read = [name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None]
    return read[0] if len(read) == 1 else None


def _outermost(block: Block) -> Iterator[nn.Module]:
    """Yield the modules of a block that are inside no other module of it."""
    inside = {part for module in block.modules for part in module.modules() if part is not module}
    yield from (module for module in block.modules if module not in inside)
