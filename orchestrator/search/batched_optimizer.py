"""AdamW for several heads at once, whose parameters are stacked along a new first axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import vmap

from orchestrator.recipe import Train


class BatchedAdamW:
    """Takes a step for each head at its own learning rate and weight decay, its gradient clipped by its own norm.

    `torch.optim` has one rate for all values of a tensor, and a parameter group for each head would cost the time that
    batching saves. But a step of AdamW is a direction that does not depend on the rate, multiplied by the rate
    (Loshchilov & Hutter 2019, algorithm 2). `torch.optim.AdamW` computes the direction as the step of rate 1 from 0.

    Args:
        stacked: the parameters by name, each of shape [heads, *shape].
        multipliers: of the learning rate and of the weight decay of each parameter, by its name.
        recipes: of the heads; the limit of the gradient's norm is the same in all.
    """

    def __init__(
        self, stacked: Mapping[str, Tensor], multipliers: Mapping[str, tuple[float, float]], recipes: Sequence[Train]
    ) -> None:
        self.parameters = list(stacked.values())
        self.directions = [torch.zeros_like(value, requires_grad=True) for value in self.parameters]
        self.optimizer = torch.optim.AdamW(self.directions, lr=1.0, weight_decay=0.0, fused=True)
        limit = recipes[0].max_grad_norm
        self.max_norm = float("inf") if limit is None else limit
        device = self.parameters[0].device
        rates = torch.tensor([train.learning_rate for train in recipes], device=device)
        decays = torch.tensor([train.weight_decay for train in recipes], device=device)
        self.rates = [per_head(rates * multipliers[name][0], value) for name, value in stacked.items()]
        self.decays = [per_head(decays * multipliers[name][1], value) for name, value in stacked.items()]

    @torch.no_grad()
    def gradient_norms(self) -> Tensor:
        """Return the norm of each head's gradient, shape [heads]."""
        gradients = [value.grad for value in self.parameters if value.grad is not None]
        norms: Tensor = vmap(lambda gradients: nn.utils.get_total_norm(gradients, foreach=False))(gradients)
        return norms

    @torch.no_grad()
    def step(self, norms: Tensor, factors: Tensor) -> None:
        """Clip the gradients, take a step, clear the gradients.

        Args:
            norms: as `gradient_norms`, shape [heads].
            factors: multiples of the heads' peak learning rates, shape [heads]; a head with 0 does not change.
        """
        clip = (self.max_norm / (norms + 1e-6)).clamp(max=1.0)  # As `torch.nn.utils.clip_grads_with_norm_`.
        for value, direction in zip(self.parameters, self.directions, strict=True):
            assert value.grad is not None
            # Values that are not finite must not reach the moments; such a head is not trained any more.
            direction.grad = value.grad.mul_(per_head(clip, value)).nan_to_num_(0.0, 0.0, 0.0)
            direction.zero_()
            value.grad = None
        self.optimizer.step()
        columns = (self.parameters, self.directions, self.rates, self.decays)
        for value, direction, peak, decay in zip(*columns, strict=True):
            rate = peak * per_head(factors, value)
            value.mul_(1 - rate * decay).addcmul_(rate, direction)


def per_head(numbers: Tensor, value: Tensor) -> Tensor:
    """Return numbers of shape [heads] in a shape that broadcasts over a stacked parameter."""
    return numbers.view(-1, *[1] * (value.dim() - 1))
