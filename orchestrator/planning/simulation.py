"""Simulate a training pass on tensors without values: the memory that it holds, and the operations that it takes.

PyTorch's fake tensors go through the very functions that training goes through, and only shapes are computed. So no
weights are needed, and a model of any size takes seconds.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator.models.shortcuts.packed_sequences import LENGTHS
from orchestrator.models.shortcuts.token_loss import IGNORED
from orchestrator.planning.operators import bytes_moved, count_operations, run_operator
from orchestrator.tasks import Task
from orchestrator.tasks.base import Batch, Totals
from orchestrator.training.assembling import ModelParts
from orchestrator.training.features.build import boundary_of

ACTIVATIONS, LOGITS, GRADIENTS, HELD = "activations", "logits", "gradients", "held"


@dataclass(frozen=True)
class PassProfile:
    """Memory (bytes, besides weights and the optimizer) and operations of a forward and a backward pass."""

    activations: int
    """The most that is held besides gradients."""
    logits: int
    """The part of it that the head and the loss hold."""
    with_gradients: int
    """The most of activations and gradients together, where each gradient is allocated as it is computed."""
    gradients: int
    """All of them, at the end."""
    frozen_operations: int
    """Floating-point operations of a forward pass through the frozen blocks alone."""
    forward_operations: int
    """Operations of a forward pass, frozen blocks included."""
    operations: int
    """Operations of a forward and a backward pass, frozen blocks included."""
    boundary_numbers: int
    """Numbers in the output of the frozen blocks."""


class ResourceTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and the bytes of all live tensors by kind.

    Args:
        num_targets: how many places of each boolean mask count as true, since no values are known.
        balance: operations that a machine does while it moves a byte. Operators that move more than they compute, such
            as norms and activation functions, are counted by that (Williams et al. 2009, "Roofline"); 0 counts
            operations alone.
    """

    def __init__(self, num_targets: int, balance: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = ACTIVATIONS
        self.live: Counter[str] = Counter()
        self.most_activations: Counter[str] = Counter()
        self.most_together: Counter[str] = Counter()
        self.operations = 0.0
        self._balance = balance
        self._num_targets = num_targets
        self._kinds: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = run_operator(function, args, kwargs, self._num_targets)
        moved = self._balance * bytes_moved(function, (args, kwargs), output)
        self.operations += max(count_operations(function, args, kwargs, output), moved)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.count(tensor, self.kind)
        return output

    def count(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's memory under a kind, unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage not in self._kinds:
            holder = self._kinds[storage] = [kind]
            self._add(kind, storage.nbytes())
            weakref.finalize(storage, self._forget, holder, storage.nbytes())

    def change_kind(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's memory, which is counted already, under another kind."""
        holder = self._kinds[tensor.untyped_storage()]
        size = tensor.untyped_storage().nbytes()
        self.live[holder[0]] -= size
        holder[0] = kind
        self._add(kind, size)

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] += size
        activations = self.live[ACTIVATIONS] + self.live[LOGITS]
        if activations > self.most_activations[ACTIVATIONS] + self.most_activations[LOGITS]:
            self.most_activations = self.live.copy()
        most = self.most_together
        if activations + self.live[GRADIENTS] > most[ACTIVATIONS] + most[LOGITS] + most[GRADIENTS]:
            self.most_together = self.live.copy()

    def _forget(self, holder: list[str], size: int) -> None:
        self.live[holder[0]] -= size


@contextlib.contextmanager
def fake_weights(module: nn.Module, input_dtype: torch.dtype | None = None) -> Iterator[FakeTensorMode]:
    """Replace a model's tensors by fake ones of the CPU, without values and memory; yields the mode that they need.

    Args:
        float_type: format of the floating-point ones; None leaves it.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        known: dict[int, Any] = {}

        def fake(value: Tensor) -> Any:
            if id(value) not in known:
                wanted = input_dtype if input_dtype is not None and value.is_floating_point() else value.dtype
                made = torch.empty(value.shape, dtype=wanted)
                is_parameter = isinstance(value, nn.Parameter)
                # With the tensor itself, or another one could get its number.
                known[id(value)] = value, nn.Parameter(made, value.requires_grad) if is_parameter else made
            return known[id(value)][1]

        for part in module.modules():
            homes: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for home in homes:
                for name, value in home.items():
                    if value is not None:
                        home[name] = fake(value)
        yield mode


def simulate(
    parts: ModelParts,
    task: Task,
    batch: Batch,
    totals: Totals,
    autocast: bool,
    input_dtype: torch.dtype | None = None,
    balance: float = 0.0,
) -> PassProfile:
    """Simulate a pass over a batch; the model's weights must be fake (`fake_weights`).

    Args:
        batch: as arrays.
        autocast: compute in bf16 with fp32 weights.
        float_type: format of floating-point inputs; None leaves it.
        balance: as `ResourceTracker` takes it.
    """
    module = parts.module
    parts.frozen.set_train_mode(module)
    target_ids = batch.inputs.get("target_ids")
    tracker = ResourceTracker(0 if target_ids is None else int((target_ids != IGNORED).sum()), balance)
    for value in (*module.parameters(), *module.buffers()):
        tracker.count(value, HELD)
    with contextlib.ExitStack() as stack:
        boundary = _watch(parts, tracker, lambda handle: stack.callback(handle.remove))
        with tracker:
            inputs, targets = _to_tensors(batch, input_dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = module(**inputs)
            forward_operations = tracker.operations
            loss = task.loss(output, Batch(inputs, targets), totals)
            del output
            loss.backward()
    alone, together = tracker.most_activations, tracker.most_together
    return PassProfile(
        activations=alone[ACTIVATIONS] + alone[LOGITS],
        logits=alone[LOGITS],
        with_gradients=together[ACTIVATIONS] + together[LOGITS] + together[GRADIENTS],
        gradients=tracker.live[GRADIENTS],
        frozen_operations=round(boundary.operations),
        forward_operations=round(forward_operations),
        operations=round(tracker.operations),
        boundary_numbers=boundary.numbers,
    )


@dataclass
class _Boundary:
    """The end of the frozen blocks, as a pass has reached it."""

    operations: float = 0.0
    numbers: int = 0


def _watch(parts: ModelParts, tracker: ResourceTracker, keep: Callable[[Any], Any]) -> _Boundary:
    """Register hooks that mark gradients, logits and the end of the frozen blocks for the tracker.

    Args:
        keep: called with the handle of each hook.
    """
    found, boundary = _Boundary(), boundary_of(parts)

    def reach_boundary(output: Any) -> None:
        tensors = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        found.operations = tracker.operations
        found.numbers = max((value.numel() for value in tensors), default=0)

    def leave_body(_module: Any, _given: Any, output: Any) -> None:
        values = tuple(output.values())
        if boundary is not None and boundary >= len(parts.blocks.layers):
            reach_boundary(values)
        tracker.kind = LOGITS
        hidden = next((value for value in tree_leaves(values) if value.requires_grad), None)
        if hidden is not None:
            hidden.register_hook(enter_body)

    def enter_body(gradient: Tensor) -> None:
        tracker.kind = ACTIVATIONS

    def count_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        tracker.change_kind(parameter.grad, GRADIENTS)

    for parameter in parts.module.parameters():
        if parameter.requires_grad:
            keep(parameter.register_post_accumulate_grad_hook(count_gradient))
    if boundary is not None and boundary < len(parts.blocks.layers):
        first = parts.blocks.layers[boundary].elements[0]
        keep(first.register_forward_pre_hook(lambda _module, given: reach_boundary(given)))
    keep(parts.body.register_forward_hook(leave_body))
    return found


def _to_tensors(batch: Batch, input_dtype: torch.dtype | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a batch's inputs and targets; lengths stay an array, because models read them as numbers."""
    inputs: dict[str, Any] = {}
    for name, values in batch.inputs.items():
        inputs[name] = values if name == LENGTHS else torch.from_numpy(values)
        if name != LENGTHS and input_dtype is not None and inputs[name].is_floating_point():
            inputs[name] = inputs[name].to(input_dtype)
    return inputs, {name: torch.from_numpy(values) for name, values in batch.targets.items()}
