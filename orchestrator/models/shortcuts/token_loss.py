"""A causal language model that returns the loss of each target token instead of logits.

Logits are the largest tensors of such a model: targets x vocabulary, several copies of them. Here they are computed for
a few targets at a time, in the forward pass and again in the backward pass (Chen et al. 2016, "Training deep nets with
sublinear memory cost"), and only at positions that have a target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from orchestrator.models.attempt import CallFailed, try_forward
from orchestrator.models.shortcuts.forward import wrap_forward
from orchestrator.models.shortcuts.packed_sequences import prepare_lengths
from orchestrator.models.shortcuts.token_pooling import eval_mode, is_close

IGNORED = -100
"""Marks positions without a target."""
LOGITS_PER_CHUNK = 2**24
WEIGHT_SCALE = 64.0  # Of the output layer, while its losses are compared with those of the logits.
ATTEMPT = "computing losses without all logits at a time"


@dataclass
class TokenLossOutput(ModelOutput):  # type: ignore[misc]
    """The output of a language model that was given target tokens."""

    token_losses: Tensor | None = None
    """The loss of each target, and 1 where the target is the most likely token, otherwise 0; fp32 of shape
    [batch, positions, 2]. Both are 0 where there is no target."""


def return_token_losses(model: Any) -> None:
    """Make `model(**inputs, target_ids=...)` return a `TokenLossOutput` in place of logits.

    `target_ids`, shape [batch, positions], holds the token to predict at each position, or IGNORED. Calls without it
    are unchanged.
    """
    _TokenLosses(model).install()


def find_token_losses(model: Any) -> _TokenLosses | None:
    """Return the state that `return_token_losses` has added to a model; None if it was not called."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: _TokenLosses | None = getattr(whole, "token_losses", None)
    return found


class _TokenLosses:
    """The functions around the forward functions of a model and of its output layer."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layer = model.get_output_embeddings()
        self.targets: Tensor | None = None
        self.is_direct = False
        """Whether losses come from the output layer, without logits of all targets at a time."""
        self.is_computed = False
        """Whether the output layer has returned losses in this pass: something may have replaced the layer."""

    def install(self) -> None:
        wrap_forward(self.model, self._run_model)
        self.model.token_losses = self
        if type(self.layer) is nn.Linear:
            wrap_forward(self.layer, self._run_output_layer)
            # An outline has no values to compare. Whoever builds one sets `is_direct`.
            self.is_direct = not self.layer.weight.is_meta and self._matches_logits()

    def _run_model(self, model: Any, original: Callable[..., Any], args: Any, inputs: dict[str, Any]) -> Any:
        target_ids = inputs.pop("target_ids", None)
        if target_ids is None:
            return original(*args, **inputs)
        self.targets, self.is_computed = target_ids, False
        inputs.setdefault("use_cache", False)  # Nothing is generated, so keys and values need not be kept.
        prepare_lengths(inputs)
        try:
            output = original(*args, **inputs)
        finally:
            self.targets = None
        losses = output.logits if self.is_computed else losses_of_logits(output.logits, target_ids)
        return TokenLossOutput(token_losses=losses)

    def _run_output_layer(self, layer: Any, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
        if self.targets is None or not self.is_direct:
            logits: Tensor = original(*args, **kwargs)
            return logits
        self.is_computed = True
        return losses_of_hidden(args[0], layer.weight, layer.bias, self.targets)

    @torch.no_grad()
    def _matches_logits(self) -> bool:
        """Whether the losses are those of the model's own logits, which some models scale or cap afterwards."""
        weight = self.layer.weight
        ids = torch.arange(1, 9, device=weight.device).remainder(len(weight))[None]
        inputs, kept = {"input_ids": ids, "target_ids": ids.flip(1)}, weight.clone()
        # A cap hardly changes the small logits of an untrained model.
        weight.mul_(WEIGHT_SCALE)
        try:
            with eval_mode(self.model):
                whole = try_forward(self.model, inputs, ATTEMPT)
                self.is_direct = True
                direct = try_forward(self.model, inputs, ATTEMPT)
        except CallFailed:
            return False
        finally:
            weight.copy_(kept)
        return is_close(direct[..., 0], whole[..., 0])


def losses_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return token losses as in `TokenLossOutput`, from logits of shape [batch, positions, vocabulary]."""
    counts = targets != IGNORED
    kept = logits[counts].float()
    losses = functional.cross_entropy(kept, targets[counts], reduction="none")
    return _scatter(losses, kept.detach().argmax(-1) == targets[counts], counts)


def losses_of_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the same from the input of the output layer, of shape [batch, positions, width]."""
    counts = targets != IGNORED
    losses, hits = _LinearCrossEntropy.apply(hidden[counts], weight, bias, targets[counts])  # type: ignore[no-untyped-call]
    return _scatter(losses, hits, counts)


def _scatter(losses: Tensor, hits: Tensor, counts: Tensor) -> Tensor:
    """Return losses and hits of the positions where `counts` holds, 0 elsewhere; [*counts.shape, 2]."""
    result = losses.new_zeros(*counts.shape, 2)
    result[counts] = torch.stack([losses, hits.to(losses.dtype)], -1)
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy after a linear layer, computed for some rows at a time.

    With logits z = W h + b and p = softmax(z), the gradient of the loss with respect to z is p - onehot(target).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return losses (fp32) and hits (bool), both [rows], from `hidden`, [rows, width]."""
        losses = hidden.new_empty(len(targets), dtype=torch.float32)
        hits = torch.empty_like(targets, dtype=torch.bool)
        normalizers = torch.empty_like(losses)
        ctx.logits_dtype = hidden.dtype
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = functional.linear(hidden[rows], weight, bias)
            ctx.logits_dtype = logits.dtype  # Under autocast not that of the weights.
            logits = logits.float()
            normalizers[rows] = logits.logsumexp(-1)
            losses[rows] = normalizers[rows] - logits.gather(1, targets[rows, None])[:, 0]
            hits[rows] = logits.argmax(-1) == targets[rows]
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, losses_gradient: Tensor, hits_gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        inputs, matrix = hidden.to(ctx.logits_dtype), weight.to(ctx.logits_dtype)
        offset = None if bias is None else bias.to(ctx.logits_dtype)
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight) if needs_weight else None
        bias_gradient = torch.zeros_like(bias) if needs_bias else None
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = functional.linear(inputs[rows], matrix, offset).float()
            gradient = logits.sub_(normalizers[rows, None]).exp_()
            gradient.scatter_add_(1, targets[rows, None], gradient.new_full((len(gradient), 1), -1.0))
            gradient = gradient.mul_(losses_gradient[rows, None]).to(ctx.logits_dtype)
            if hidden_gradient is not None:
                hidden_gradient[rows] = (gradient @ matrix).to(hidden.dtype)
            if weight_gradient is not None:
                weight_gradient += gradient.T @ inputs[rows]
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0)
        return hidden_gradient, weight_gradient, bias_gradient, None


def _chunks(num_rows: int, vocabulary_size: int) -> list[slice]:
    size = max(1, LOGITS_PER_CHUNK // vocabulary_size)
    return [slice(start, start + size) for start in range(0, num_rows, size)]
