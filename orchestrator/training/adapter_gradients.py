"""Which modules of an adapter get a gradient, found out at the first step: what gets none stays as it is."""

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

NAMED = 3


class AdapterGradients:
    """A hook of the loop that says which adapted modules the loss does not depend on.

    Some get no gradient by design: those of attention that no output reads, experts that no token is sent to. What
    there is to learn is learned all the same.

    Args:
        model: a `PeftModel`, as it was built.
        note: keeps a sentence for the user.
    """

    def __init__(self, engine: Engine, model: Any, note: Callable[[str], None]) -> None:
        self.engine = engine
        self.note = note
        self.parts = list(models.trained_modules(model))
        self._found = torch.zeros(len(self.parts), device=engine.device)
        # On the parameters themselves, because DeepSpeed takes their gradients away within the backward pass.
        self._handles = [
            parameter.register_hook(self._looker(number))  # type: ignore[no-untyped-call]
            for number, values in enumerate(models.trained_modules(model).values())
            for parameter in values.values()
        ]

    def _looker(self, number: int) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            self._found[number] += gradient.any()

        return look

    def after_step(self, step: Step, state: TrainingState) -> None:
        """Judge the first step that had something to learn.

        Raises:
            RunFailed: nothing gets a gradient.
        """
        if not self._handles or (step.gradient_norm == 0 and step.loss == 0):
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if step.gradient_norm == 0:
            raise RunFailed(
                "nothing of what is trained gets a gradient, so nothing would be learned\n"
                "    -> name other modules in transfer.adapter.targets, or set transfer.adapter to null"
            )
        reached = self.engine.sum_over_workers(self._found).tolist()
        left = [name for name, found in zip(self.parts, reached, strict=True) if not found]
        if left:
            some = ", ".join(left[:NAMED]) + (", ..." if len(left) > NAMED else "")
            text = (
                f"{len(left)} of the {len(self.parts)} modules that an adapter is trained in got no gradient at step "
                f"{step.number} ({some}): as long as nothing that is learned depends on them, they stay as they are"
            )
            self.engine.run_on_first_worker(lambda: self.note(text))
