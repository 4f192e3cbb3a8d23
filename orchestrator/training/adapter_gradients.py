"""Find the modules of an adapter that get no gradient in the first step, and so are not trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orchestrator import models
from orchestrator.errors import RunFailed
from orchestrator.training.engine.base import Engine
from orchestrator.training.hooks import TrainingState
from orchestrator.training.loop import Step

MOST_NAMED = 3


class AdapterGradients:
    """A hook of the loop that notes which adapted modules the loss does not depend on.

    Some modules get no gradient by design, such as attention that no output reads, or experts that no token is sent to.
    The others are trained all the same.

    Args:
        model: a `PeftModel`, as it was built.
        note: adds a sentence to the run's notes.
    """

    def __init__(self, engine: Engine, model: Any, note: Callable[[str], None]) -> None:
        self.engine = engine
        self.note = note
        self.parts = list(models.trained_modules(model))
        self._found = torch.zeros(len(self.parts), device=engine.device)
        # Hooks see gradients that DeepSpeed removes during the backward pass.
        self._handles = [
            parameter.register_hook(self._gradient_hook(number))  # type: ignore[no-untyped-call]
            for number, values in enumerate(models.trained_modules(model).values())
            for parameter in values.values()
        ]

    def _gradient_hook(self, number: int) -> Callable[[Tensor], None]:
        def check(gradient: Tensor) -> None:
            self._found[number] += gradient.any()

        return check

    def after_step(self, step: Step, state: TrainingState) -> None:
        """Check the first step whose loss or gradient is not 0.

        Raises:
            RunFailed: no trained parameter gets a gradient.
        """
        if not self._handles or (step.gradient_norm == 0 and step.loss == 0):
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if step.gradient_norm == 0:
            raise RunFailed(
                "no trained parameter gets a gradient, so nothing would be learned\n"
                "    -> name other modules in transfer.adapter.targets, or set transfer.adapter to null"
            )
        reached = self.engine.sum_over_workers(self._found).tolist()
        left = [name for name, found in zip(self.parts, reached, strict=True) if not found]
        if left:
            some = ", ".join(left[:MOST_NAMED]) + (", ..." if len(left) > MOST_NAMED else "")
            text = (
                f"{len(left)} of the {len(self.parts)} modules of the adapter got no gradient at step {step.number} "
                f"({some}): they do not change while the loss does not depend on them"
            )
            self.engine.run_on_first_worker(lambda: self.note(text))
