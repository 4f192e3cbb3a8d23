"""A causal language model that answers with the loss of each target token instead of logits.

Logits are the largest thing that such a model computes: targets x vocabulary, several times over. Here they exist for a
few targets at a time, in the forward pass and once more in the backward pass (Chen et al. 2016, "Training deep nets
with sublinear memory cost"), and only where there is a target.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from orchestrator.models.attempt import CallFailed, try_forward
from orchestrator.models.shortcuts.packed_sequences import spell_out
from orchestrator.models.shortcuts.token_pooling import eval_mode, is_close

IGNORED = -100
"""What stands for no target."""
NUMBERS_TOGETHER = 2**24  # Logits at a time.
ENLARGED = 64.0
DIRECT = "computing losses without all logits at a time"


@dataclass
class TokenLossOutput(ModelOutput):  # type: ignore[misc]
    """What a language model returns for target tokens."""

    token_losses: Tensor | None = None
    """The loss, and whether the target is the token that the model thinks likeliest: fp32 of shape
    [batch, positions, 2], 0 where there is no target."""


def return_token_losses(model: Any) -> None:
    """Make `model(**inputs, target_ids=...)` return a `TokenLossOutput` in place of logits.

    `target_ids`, shape [batch, positions], holds the token to predict at each position, or IGNORED. Without it the
    model is as it was.
    """
    _TokenLosses(model).install()


def find_token_losses(model: Any) -> _TokenLosses | None:
    """What `answer_with_losses` has put into a model; None where it has put nothing."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: _TokenLosses | None = getattr(whole, "token_losses", None)
    return found


class _TokenLosses:
    """What stands in for the forward functions of a model and of its output layer."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layer = model.get_output_embeddings()
        self.targets: Tensor | None = None
        self.is_direct = False
        """Whether losses come from the output layer, without logits of all targets at a time."""
        self.has_answered = False
        """Whether they did in this pass: the layer may have been replaced by another one."""

    def install(self) -> None:
        # Functions rather than hooks: peft calls the model that it wraps without its hooks.
        whole = self.model.forward

        @functools.wraps(whole)
        def forward(*args: Any, target_ids: Tensor | None = None, **inputs: Any) -> Any:
            if target_ids is None:
                return whole(*args, **inputs)
            self.targets, self.has_answered = target_ids, False
            inputs.setdefault("use_cache", False)  # Nothing is written, so no keys and values need be kept.
            spell_out(inputs)
            try:
                output = whole(*args, **inputs)
            finally:
                self.targets = None
            losses = output.logits if self.has_answered else losses_of_logits(output.logits, target_ids)
            return TokenLossOutput(token_losses=losses)

        self.model.forward = forward
        self.model.token_losses = self
        if type(self.layer) is nn.Linear:
            self._replace_output_layer()
            # Of an outline, which has no values, somebody else must know.
            self.is_direct = not self.layer.weight.is_meta and self._agrees()

    def _replace_output_layer(self) -> None:
        def forward(layer: nn.Linear, hidden: Tensor) -> Tensor:
            if self.targets is None or not self.is_direct:
                return nn.Linear.forward(layer, hidden)
            self.has_answered = True
            return losses_of_hidden(hidden, layer.weight, layer.bias, self.targets)

        # A method of the layer: that of a copy, which peft makes of what is trained whole, has the copy's weights.
        self.layer.forward = MethodType(forward, self.layer)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether the losses are those of the model's own logits, which some models scale or bend afterwards."""
        weight = self.layer.weight
        ids = torch.arange(1, 9, device=weight.device).remainder(len(weight))[None]
        inputs, kept = {"input_ids": ids, "target_ids": ids.flip(1)}, weight.clone()
        # The small logits of a model that knows nothing are hardly bent yet.
        weight.mul_(ENLARGED)
        try:
            with eval_mode(self.model):
                whole = try_forward(self.model, inputs, DIRECT)
                self.is_direct = True
                direct = try_forward(self.model, inputs, DIRECT)
        except CallFailed:
            return False
        finally:
            weight.copy_(kept)
        return is_close(direct[..., 0], whole[..., 0])


def losses_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """What `answer_with_losses` promises, from logits of shape [batch, positions, vocabulary]."""
    counts = targets != IGNORED
    kept = logits[counts].float()
    losses = functional.cross_entropy(kept, targets[counts], reduction="none")
    return _spread(losses, kept.detach().argmax(-1) == targets[counts], counts)


def losses_of_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The same from what the output layer reads, of shape [batch, positions, width]."""
    counts = targets != IGNORED
    losses, hits = _LinearCrossEntropy.apply(hidden[counts], weight, bias, targets[counts])  # type: ignore[no-untyped-call]
    return _spread(losses, hits, counts)


def _spread(losses: Tensor, hits: Tensor, counts: Tensor) -> Tensor:
    result = losses.new_zeros(*counts.shape, 2)
    result[counts] = torch.stack([losses, hits.to(losses.dtype)], -1)
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy after a linear layer, some rows at a time.

    With logits z = W h + b and p = softmax(z), the gradient by z is p - onehot(target), times what comes from above.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses (fp32) and hits (bool), both of shape [rows], of `hidden`, [rows, width]."""
        losses = hidden.new_empty(len(targets), dtype=torch.float32)
        hits = torch.empty_like(targets, dtype=torch.bool)
        normalizers = torch.empty_like(losses)
        ctx.logits_type = hidden.dtype
        for part in _parts(len(targets), weight.shape[0]):
            logits = functional.linear(hidden[part], weight, bias)
            ctx.logits_type = logits.dtype  # Under autocast another than that of the weights.
            logits = logits.float()
            normalizers[part] = logits.logsumexp(-1)
            losses[part] = normalizers[part] - logits.gather(1, targets[part, None])[:, 0]
            hits[part] = logits.argmax(-1) == targets[part]
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, from_losses: Tensor, from_hits: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        narrow, matrix = hidden.to(ctx.logits_type), weight.to(ctx.logits_type)
        offset = None if bias is None else bias.to(ctx.logits_type)
        hidden_gradient = torch.empty_like(hidden) if of_hidden else None
        weight_gradient = torch.zeros_like(weight) if of_weight else None
        bias_gradient = torch.zeros_like(bias) if of_bias else None
        for part in _parts(len(targets), weight.shape[0]):
            logits = functional.linear(narrow[part], matrix, offset).float()
            gradient = logits.sub_(normalizers[part, None]).exp_()
            gradient.scatter_add_(1, targets[part, None], gradient.new_full((len(gradient), 1), -1.0))
            gradient = gradient.mul_(from_losses[part, None]).to(ctx.logits_type)
            if hidden_gradient is not None:
                hidden_gradient[part] = (gradient @ matrix).to(hidden.dtype)
            if weight_gradient is not None:
                weight_gradient += gradient.T @ narrow[part]
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0)
        return hidden_gradient, weight_gradient, bias_gradient, None


def _parts(num_rows: int, width: int) -> list[slice]:
    size = max(1, NUMBERS_TOGETHER // width)
    return [slice(start, start + size) for start in range(0, num_rows, size)]
