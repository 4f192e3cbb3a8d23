"""Find the blocks of a model, in the order of data, from its structure and one small forward pass."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.errors import ModelError, Problem
from orchestrator.models.attempt import calling_model, head_output
from orchestrator.models.body import find_body
from orchestrator.models.head import head_modules
from orchestrator.models.outline import is_outline, run_outline

Layers = list[tuple[nn.Module, ...]]  # mostly one module per layer; some models keep its parts in parallel lists
Calls = dict[nn.Module, int]  # when each module was first called
Owners = dict[nn.Module, int]  # the number of each module's block: 0 is the stem, k the k-th layer, one more the tail
HEAD = sys.maxsize  # the head's number, after all others


@dataclass(frozen=True)
class Block:
    """One unit of depth."""

    name: str
    """`stem`, `layer 1`, ..., `tail` or `head`."""
    modules: tuple[nn.Module, ...]
    """All modules of the block, nested ones included; a layer's outermost comes first."""
    parameters: tuple[str, ...]
    """Names as in `model.named_parameters()`."""
    elements: tuple[nn.Module, ...] = ()
    """A layer's outermost modules in the order of data: mostly one, several in models with parallel lists."""


@dataclass(frozen=True)
class Blocks:
    """All blocks of a model: each parameter is in exactly one."""

    stem: Block
    """The modules that run before the first layer, and all embeddings."""
    layers: tuple[Block, ...]
    """In the order of data, an encoder's before its decoder's; each with the modules that run before the next one."""
    tail: Block
    """The modules of the body that run after the last layer has started: a final norm, a pooler."""
    head: Block
    """The modules outside the body, and every parameter that the source did not have."""
    containers: tuple[nn.Module, ...]
    """Modules around layers, including the body. Their code may drop out features or layers in training mode."""

    def in_order(self) -> tuple[Block, ...]:
        """Return stem, layers, tail, head."""
        return (self.stem, *self.layers, self.tail, self.head)


def find_blocks(model: Any, example_inputs: dict[str, Tensor], new_parameters: frozenset[str]) -> Blocks:
    """Divide a model into blocks.

    Layers are the elements of the body's outermost module lists, in the order in which a forward pass calls them. Other
    modules belong to the layer that was called last before them, or to the stem. Nothing is known of architectures.

    Args:
        model: a model of transformers; its modes and the random streams are left as they are.
        example_inputs: tiny inputs of the whole model, such as `input_ids` of shape [1, 4].
        new_parameters: names of the parameters that the source did not have.

    Raises:
        ModelError: the model has no layers, or returns no logits.
        CallFailed: the model cannot read the inputs.
    """
    calls = _trace(model, example_inputs)
    layers = _find_layers(find_body(model), calls)
    if not layers:
        remedy = "use a source model built of layers, such as a transformer"
        raise ModelError(Problem(f"no layers were found in {type(model).__name__}", remedy=remedy))
    names = ["stem", *(f"layer {number}" for number in range(1, len(layers) + 1)), "tail", "head"]
    owners, containers = _assign_modules(model, layers, calls)
    parameters = _assign_parameters(model, owners, new_parameters)
    for module in owners:
        own = [parameters[parameter] for parameter in module.parameters(recurse=False)]
        if own and all(owner == HEAD for owner in own):
            owners[module] = HEAD
    around = {*containers, *_find_wrappers(model)}
    blocks = [
        Block(
            name,
            tuple(module for module, owner in owners.items() if owner == index and module not in around),
            tuple(named for named, parameter in model.named_parameters() if parameters[parameter] == index),
            layers[index - 1] if 0 < index <= len(layers) else (),
        )
        for index, name in zip([*range(len(names) - 1), HEAD], names, strict=True)
    ]
    assert sum(len(block.parameters) for block in blocks) == len(list(model.named_parameters()))
    return Blocks(blocks[0], tuple(blocks[1:-2]), blocks[-2], blocks[-1], tuple(containers))


def _trace(model: Any, example_inputs: dict[str, Tensor]) -> Calls:
    """Return when each module of the body is first called; modules that are not called have no entry."""
    calls: Calls = {}

    def note_call(module: nn.Module, _: Any) -> None:
        calls.setdefault(module, len(calls))

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for module in find_body(model).modules():
            stack.callback(module.register_forward_pre_hook(note_call).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        model.eval()
        with calling_model("finding the layers"):
            if is_outline(model):
                output = run_outline(model, example_inputs)
            else:
                output = model(**{name: value.to(model.device) for name, value in example_inputs.items()})
    try:
        head_output(output)
    except TypeError as error:
        remedy = "use a source model of another architecture"
        raise ModelError(Problem(f"{type(model).__name__} returns no logits", remedy=remedy)) from error
    # Some models call `layer.forward(...)`, which triggers no hook; then the first call inside counts.
    inside = {
        module: [calls[part] for part in module.modules() if part in calls]
        for module in find_body(model).modules()
        if module not in calls
    }
    return calls | {module: min(times) for module, times in inside.items() if times}


def _find_layers(body: nn.Module, calls: Calls) -> Layers:
    layers = [layer for lists in _find_lists(body) for layer in _align([x for x in lists if _is_run(x, calls)], calls)]
    return sorted(layers, key=lambda layer: calls[layer[0]])


def _find_lists(module: nn.Module) -> Iterator[list[list[nn.Module]]]:
    """Yield the outermost module lists, those of one parent together; a list of lists counts as one list."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    yield [list(_flatten(each)) for each in lists]
    for child in module.children():
        if child not in lists:
            yield from _find_lists(child)


def _flatten(modules: nn.ModuleList) -> Iterator[nn.Module]:
    for module in dict.fromkeys(modules):  # a layer that is used several times counts once
        if isinstance(module, nn.ModuleList):
            yield from _flatten(module)
        else:
            yield module


def _is_run(modules: Sequence[nn.Module], calls: Calls) -> bool:
    """Whether these are modules with weights that run one after the other."""
    if not modules or not all(module in calls and any(True for _ in module.parameters()) for module in modules):
        return False
    return all(calls[one] < calls[next_one] for one, next_one in pairwise(modules))


def _align(lists: list[list[nn.Module]], calls: Calls) -> Layers:
    """Return the layers in the lists of one parent.

    Lists that alternate (attention 1, feed-forward 1, attention 2, ...) are parts of the same layers; lists that follow
    one another are separate layers.
    """
    if len(lists) > 1 and len(lists[0]) > 1 and len({len(each) for each in lists}) == 1:
        layers = [tuple(sorted(parts, key=calls.__getitem__)) for parts in zip(*lists, strict=True)]
        if all(calls[one[-1]] < calls[next_one[0]] for one, next_one in pairwise(layers)):
            return layers
    return [(module,) for each in lists for module in each]


def _assign_modules(model: Any, layers: Layers, calls: Calls) -> tuple[Owners, list[nn.Module]]:
    """Return the number of each module's block, and the modules around layers."""
    owners: Owners = {}
    for number, layer in enumerate(layers, start=1):
        for element in layer:
            for module in element.modules():
                owners.setdefault(module, number)
    elements = {element for layer in layers for element in layer}
    starts = [calls[layer[0]] for layer in layers]
    containers = []
    for module in find_body(model).modules():
        if module in owners:
            continue
        owners[module] = _find_owner(module, calls, starts)
        if not elements.isdisjoint(module.modules()):
            containers.append(module)
    outside = [module for _, module in head_modules(model)] + _find_wrappers(model)
    return owners | dict.fromkeys(outside, HEAD), containers


def _find_owner(module: nn.Module, calls: Calls, starts: Sequence[int]) -> int:
    if isinstance(module, nn.Embedding) or module not in calls:
        # Embeddings of a decoder are called late, but precede all layers; weights of modules never called are read.
        return 0
    num_started = bisect_right(starts, calls[module])
    return num_started if num_started < len(starts) else len(starts) + 1


def _find_wrappers(model: Any) -> list[nn.Module]:
    """Return the model itself, and whatever else is around its body."""
    body = find_body(model)
    return [module for module in model.modules() if module is not body and body in set(module.modules())]


def _assign_parameters(model: Any, owners: Owners, new_parameters: frozenset[str]) -> dict[nn.Parameter, int]:
    """Return the number of each parameter's block: the earliest, where modules share it."""
    numbers: dict[nn.Parameter, int] = {}
    for module, owner in owners.items():
        for parameter in module.parameters(recurse=False):
            numbers[parameter] = min(owner, numbers.get(parameter, HEAD))
    for name, parameter in model.named_parameters():
        if name in new_parameters:
            numbers[parameter] = HEAD
    return numbers
