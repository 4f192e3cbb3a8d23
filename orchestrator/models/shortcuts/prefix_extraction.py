"""Whether the frozen blocks of a model can be replaced by their output: tried out, with the whole model beside it.

It holds for most models, and is not taken for granted for any: where layers hand on more than hidden states, or where
the fed model's outputs differ from the whole model's, nothing is fed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.models.attempt import CallFailed, try_forward, try_gradients
from orchestrator.models.blocks import Block, Blocks
from orchestrator.models.shortcuts.prefix import FEATURES, BoundaryNotReached, Form, Prefix, hidden_of, with_hidden
from orchestrator.models.shortcuts.token_pooling import TokenPooling, count_examples, eval_mode, is_close

HANDS_ON_MORE = "its layers hand on more than hidden states"
NO_ROWS = "what its layers hand on does not have one row for each example"
SPLITTING = "feeding the output of the frozen blocks"


@dataclass(frozen=True)
class PrefixUnavailable:
    """Why the frozen blocks of a model cannot be replaced by their output."""

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
    """Make the blocks below a boundary replaceable by what they make of an example.

    It is tried out on the inputs: the model fed with features must give the same outputs as the whole model.

    Args:
        model: what is called: the model, or a wrapper of adapters around it.
        body: the model's `base_model`, without its head.
        boundary: number of frozen layers; one more than there are where the tail is frozen too.
        inputs: a few real examples of uneven length; what the model's forward pass takes.
        beside: what of them goes along with features.
        pick: the position that the head reads, if it is only one.
    """
    try:
        stem = _find_replaceable(model, blocks, inputs)
    except CallFailed as error:
        return PrefixUnavailable(f"{HANDS_ON_MORE} ({error.reason})")
    prefix = Prefix(model, body, blocks, boundary, pooling, stem)
    reason = _try_out(prefix, inputs, extra_inputs)
    if reason is None:
        return prefix
    prefix.remove()
    return PrefixUnavailable(reason)


def _find_replaceable(model: Any, blocks: Blocks, inputs: dict[str, Tensor]) -> list[nn.Module]:
    """The parts of the stem that matter to the first layer's hidden states alone.

    The others (a norm of the relative positions that all layers read) have to compute in every pass.
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
        return Form.of(output).wrap(outputs[-1][1].clone())

    def cut_hidden(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return with_hidden(args, kwargs, hidden_of(args, kwargs).detach())

    hooks = [module.register_forward_hook(cut_output) for module in parts]
    hooks.append(blocks.layers[0].elements[0].register_forward_pre_hook(cut_hidden, with_kwargs=True))
    try:
        with torch.enable_grad(), eval_mode(model):
            logits = try_forward(model, inputs, SPLITTING)
            gradients = try_gradients(logits, [start for _, start in outputs], SPLITTING)
    finally:
        for hook in hooks:
            hook.remove()
    read = {module for (module, _), gradient in zip(outputs, gradients, strict=True) if gradient is not None}
    return [module for module in parts if module not in read]


def _try_out(prefix: Prefix, inputs: dict[str, Tensor], extra_inputs: dict[str, Tensor]) -> str | None:
    """Why feeding features does not give what the whole model gives; None when it does."""
    model, boundary = prefix.model, prefix.boundary
    try:
        with eval_mode(model), torch.no_grad():
            with torch.enable_grad():
                whole = try_forward(model, inputs, SPLITTING)
            if boundary > prefix.num_layers:
                prefix.needed = _find_needed(model, prefix, inputs)
                if prefix.needed is None:
                    return "its head reads more than one output of its body"
            features = prefix.compute(inputs, [boundary])[boundary]
            if not (isinstance(features, Tensor) and features.shape[:1] == (count_examples(inputs),)):
                return NO_ROWS
            features = as_stored(features, extra_inputs)
            # Not all of the examples: what a layer hands on of a batch besides hidden states fits no other batch.
            some = max(1, len(features) - 1)
            given = {name: value[:some] for name, value in extra_inputs.items()}
            with torch.enable_grad():
                fed = try_forward(model, {**given, FEATURES: features[:some]}, SPLITTING)
            reached = [_reached_by(logits, model) for logits in (whole, fed)]
    except CallFailed as error:
        return f"{HANDS_ON_MORE} ({error.reason})"
    except BoundaryNotReached as error:
        return str(error)
    if reached[0] != reached[1]:
        return "something is trained that its frozen blocks depend on"
    return None if is_close(fed, whole[:some]) else HANDS_ON_MORE


def as_stored(features: Tensor, extra_inputs: dict[str, Tensor]) -> Tensor:
    """Return features as a store gives them back, with zeros where a text is padded: some heads read what is there."""
    mask = extra_inputs.get("attention_mask")
    if mask is None or features.dim() != 3 or features.shape[:2] != mask.shape:
        return features
    return features * mask[..., None].to(features.dtype)


def _reached_by(logits: Tensor, model: nn.Module) -> list[bool]:
    """Which trained parameters have a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [gradient is not None for gradient in try_gradients(logits, trained, SPLITTING)]


def _find_needed(model: Any, prefix: Prefix, inputs: dict[str, Tensor]) -> str | None:
    """The one part of the body's output that the logits depend on; None where there are several, or it is not named."""
    try_forward(model, inputs, SPLITTING)
    output = prefix.output
    if not isinstance(output, dict):  # The body was not called, or returns a plain tuple.
        return None
    parts = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}
    leaves = {name: value.detach().requires_grad_() for name, value in parts.items()}
    original = prefix.body.forward
    prefix.body.forward = lambda *args, **kwargs: type(output)(**{**output, **leaves})
    try:
        with torch.enable_grad():
            logits = try_forward(model, inputs, SPLITTING)
            gradients = try_gradients(logits, list(leaves.values()), SPLITTING)
    finally:
        prefix.body.forward = original
    needed = [name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None]
    return needed[0] if len(needed) == 1 else None


def _outermost(block: Block) -> Iterator[nn.Module]:
    inside = {part for module in block.modules for part in module.modules() if part is not module}
    yield from (module for module in block.modules if module not in inside)
