"""A pass of training on tensors without values: what it holds in memory, and how many operations it takes.

PyTorch's fake tensors go through the very functions that training goes through, and only shapes are worked out. So no
weights are needed, and a model of any size takes seconds.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from orchestrator.models.shortcuts.packed_sequences import LENGTHS
from orchestrator.models.shortcuts.token_loss import IGNORED
from orchestrator.tasks import Task
from orchestrator.tasks.base import Batch, Totals
from orchestrator.training.assembling import Parts
from orchestrator.training.features.build import boundary_of

_ATEN = torch.ops.aten
ACTIVATIONS, LOGITS, GRADIENTS, HELD = "activations", "logits", "gradients", "held"


@dataclass(frozen=True)
class PassProfile:
    """What some forward and backward passes of one worker take, besides weights and the optimizer; in bytes."""

    activations: int
    """The most that is held beside gradients."""
    logits: int
    """The part of it that the head and the loss hold."""
    with_gradients: int
    """The most of both together, where each gradient comes into being as it is computed."""
    gradients: int
    """All of them, at the end."""
    frozen_operations: int
    """Of one forward pass through the frozen blocks alone; floating-point operations, two for a multiplication with
    addition."""
    forward_operations: int
    """Of one forward pass, the frozen blocks among them."""
    operations: int
    """Of one pass, forward and backward, the frozen blocks among them."""
    boundary_numbers: int
    """What the frozen blocks hand on; numbers."""


class ResourceTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are alive, by kind, and operations."""

    def __init__(self, num_targets: int, balance: float = 0.0) -> None:
        """
        Args:
            num_targets: how many places of a mask are true: which ones nobody knows.
            balance: operations that a machine does while it moves a byte. What moves more than it computes, such as
                norms and activation functions, counts by that (Williams et al. 2009, "Roofline"); 0: by operations.
        """
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
        packet = function._overloadpacket
        if packet in _BY_HAND and (found := _BY_HAND[packet](self._num_targets, *args, **kwargs)) is not None:
            out = found[0]
        else:
            out = function(*args, **kwargs)
        operations = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        self.operations += max(operations, self._balance * bytes_moved(function, (args, kwargs), out))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor, self.kind)
        return out

    def count(self, tensor: Tensor, kind: str) -> None:
        """Have a tensor's memory be of a kind, unless it is known already."""
        storage = tensor.untyped_storage()
        if storage not in self._kinds:
            holder = self._kinds[storage] = [kind]
            self._add(kind, storage.nbytes())
            weakref.finalize(storage, self._forget, holder, storage.nbytes())

    def turn(self, tensor: Tensor, kind: str) -> None:
        """Have memory that is known be of another kind."""
        holder = self._kinds[tensor.untyped_storage()]
        size = tensor.untyped_storage().nbytes()
        self.live[holder[0]] -= size
        holder[0] = kind
        self._add(kind, size)

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] += size
        beside = self.live[ACTIVATIONS] + self.live[LOGITS]
        if beside > self.most_activations[ACTIVATIONS] + self.most_activations[LOGITS]:
            self.most_activations = self.live.copy()
        most = self.most_together
        if beside + self.live[GRADIENTS] > most[ACTIVATIONS] + most[LOGITS] + most[GRADIENTS]:
            self.most_together = self.live.copy()

    def _forget(self, holder: list[str], size: int) -> None:
        self.live[holder[0]] -= size


def bytes_moved(function: Any, given: Any, out: Any) -> int:
    """What an operation reads and writes; nothing where it only looks at the same numbers otherwise, or makes room."""
    made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
    if not made or function.is_view or function._overloadpacket in _MAKE_ROOM:
        return 0
    read = [each for each in tree_leaves(given) if isinstance(each, Tensor)]
    return sum(each.numel() * each.element_size() for each in (*read, *made))


_MAKE_ROOM = {_ATEN.empty, _ATEN.empty_like, _ATEN.new_empty, _ATEN.empty_strided, _ATEN.new_empty_strided}


def _read_scalar(num_targets: int, tensor: Tensor) -> tuple[Any] | None:
    # Models ask of their masks whether they mask nothing; with padding the answer is no.
    return (False,) if tensor.dtype == torch.bool else None


def _index(num_targets: int, tensor: Tensor, indices: Sequence[Tensor | None]) -> tuple[Tensor] | None:
    mask = indices[0] if indices else None
    if mask is None or mask.dtype != torch.bool:
        return None
    return (tensor.new_empty((num_targets, *tensor.shape[mask.ndim :])),)


def _put(num_targets: int, tensor: Tensor, indices: Sequence[Tensor | None], *_: Any) -> tuple[Tensor] | None:
    mask = indices[0] if indices else None
    return (tensor,) if mask is not None and mask.dtype == torch.bool else None


def _put_copy(num_targets: int, tensor: Tensor, indices: Sequence[Tensor | None], *rest: Any) -> tuple[Tensor] | None:
    found = _put(num_targets, tensor, indices, *rest)
    return None if found is None else (torch.empty_like(tensor),)


_BY_HAND: dict[Any, Callable[..., tuple[Any] | None]] = {
    _ATEN._local_scalar_dense: _read_scalar,
    _ATEN.index: _index,
    _ATEN.index_put_: _put,
    _ATEN._index_put_impl_: _put,
    _ATEN.index_put: _put_copy,
    _ATEN._unsafe_index_put: _put_copy,
}
"""Operations whose result depends on values, as functions of the number of targets."""


@contextlib.contextmanager
def fake_weights(module: nn.Module, float_type: torch.dtype | None = None) -> Iterator[FakeTensorMode]:
    """A mode in which a model's tensors have no values, and no memory; those of the meta device become the CPU's.

    Args:
        float_type: what those of floating numbers are turned into; None leaves them.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        known: dict[int, Any] = {}

        def fake(value: Tensor) -> Any:
            if id(value) not in known:
                wanted = float_type if float_type is not None and value.is_floating_point() else value.dtype
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
    parts: Parts,
    task: Task,
    batch: Batch,
    totals: Totals,
    autocast: bool,
    float_type: torch.dtype | None = None,
    balance: float = 0.0,
) -> PassProfile:
    """A pass over a batch; the model's weights must be fake (`fake_weights`).

    Args:
        batch: as arrays.
        autocast: compute in bf16 with fp32 weights.
        float_type: what floating inputs are turned into; None leaves them.
        balance: as `Tally` has it.
    """
    module = parts.module
    parts.frozen.set_train_mode(module)
    arrays = batch.inputs
    tally = ResourceTracker(int((arrays["target_ids"] != IGNORED).sum()) if "target_ids" in arrays else 0, balance)
    handles = []
    for value in (*module.parameters(), *module.buffers()):
        tally.count(value, HELD)
    for value in module.parameters():
        if value.requires_grad:
            handles.append(value.register_post_accumulate_grad_hook(lambda value: tally.turn(value.grad, GRADIENTS)))
    boundary = Boundary()

    def enter_trained(_module: Any, given: Any) -> None:
        boundary.operations = tally.operations
        boundary.numbers = max((value.numel() for value in tree_leaves(given) if isinstance(value, Tensor)), default=0)

    def leave_body(_module: Any, _given: Any, output: Any) -> None:
        tally.kind = LOGITS
        hidden = next((value for value in tree_leaves(tuple(output.values())) if value.requires_grad), None)
        if hidden is not None:
            hidden.register_hook(enter_body)

    def enter_body(gradient: Tensor) -> None:
        tally.kind = ACTIVATIONS

    trained = first_trained(parts)
    if trained is not None:
        handles.append(trained.register_forward_pre_hook(enter_trained))
    handles.append(parts.body.register_forward_hook(leave_body))
    with tally:
        # Lengths are read as numbers.
        inputs: dict[str, Any] = {name: torch.from_numpy(values) for name, values in arrays.items() if name != LENGTHS}
        inputs |= {name: values for name, values in arrays.items() if name == LENGTHS}
        targets = {name: torch.from_numpy(values) for name, values in batch.targets.items()}
        if float_type is not None:
            wide = {name: each for name, each in inputs.items() if name != LENGTHS and each.is_floating_point()}
            inputs |= {name: each.to(float_type) for name, each in wide.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = module(**inputs)
        forward_operations = tally.operations
        loss = task.loss(output, Batch(inputs, targets), totals)
        del output
        loss.backward()
    for handle in handles:
        handle.remove()
    beside, together = tally.most_activations, tally.most_together
    return PassProfile(
        activations=beside[ACTIVATIONS] + beside[LOGITS],
        logits=beside[LOGITS],
        with_gradients=together[ACTIVATIONS] + together[LOGITS] + together[GRADIENTS],
        gradients=tally.live[GRADIENTS],
        frozen_operations=round(boundary.operations),
        forward_operations=round(forward_operations),
        operations=round(tally.operations),
        boundary_numbers=boundary.numbers,
    )


@dataclass
class Boundary:
    """Where the frozen blocks end."""

    operations: float = 0.0
    numbers: int = 0


def first_trained(parts: Parts) -> nn.Module | None:
    """The module at which what is computed once ends, and what is trained begins; None where nothing is frozen."""
    boundary = boundary_of(parts)
    if boundary is None:
        return None
    if boundary < len(parts.blocks.layers):
        return parts.blocks.layers[boundary].elements[0]
    return None
