"""Freeze the lowest blocks of a model: they get no gradients, and run in evaluation mode while the model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from orchestrator.errors import ModelError, Problem
from orchestrator.models.blocks import Block, Blocks
from orchestrator.recipe import FreezeDepth, FrozenRange


@dataclass(frozen=True)
class Frozen:
    """The frozen part of a model. It refers to modules, which stay the same in wrappers of the model."""

    depth: FrozenRange
    parameters: frozenset[str]
    """Their names at the time when the model was frozen."""
    modules: tuple[nn.Module, ...]

    def set_train_mode(self, model: nn.Module) -> None:
        """Put a model into training mode, but for frozen modules: without dropout and new batch norm statistics."""
        model.train()
        for module in self.modules:
            # Not `eval()`, which would change modules inside that are not frozen: a module of the stem may hold layers.
            module.training = False


def resolve_depth(freeze: int | str, num_layers: int, where: str | None = None) -> FrozenRange:
    """Return the blocks that a recipe freezes in a model with this many layers.

    Args:
        freeze: a freeze depth as a recipe writes it.
        where: place of the value, for messages.

    Raises:
        ModelError: the model has fewer layers.
    """
    depth = FreezeDepth.parse(freeze)
    if depth.layers > num_layers:
        remedy = f"set transfer.freeze to {num_layers} or less, or to all"
        what = f"freeze depth is {depth.layers}, but the model has {num_layers} layers"
        raise ModelError(Problem(what, where, remedy))
    return depth.resolve(num_layers)


def frozen_blocks(blocks: Blocks, depth: FrozenRange) -> tuple[Block, ...]:
    """Return the frozen blocks of a model, lowest first."""
    return (
        *((blocks.stem,) if depth.stem else ()),
        *blocks.layers[: depth.num_layers],
        *((blocks.tail,) if depth.tail else ()),
    )


def freeze_blocks(model: Any, blocks: Blocks, depth: FrozenRange) -> Frozen:
    """Set `requires_grad` of every parameter: False in frozen blocks and for 4-bit weights, True for all others.

    Raises:
        ModelError: nothing is left to train.
    """
    frozen = frozen_blocks(blocks, depth)
    names = frozenset(name for block in frozen for name in block.parameters)
    parameters = dict(model.named_parameters())
    if not parameters.keys() - names:
        raise ModelError(Problem("every parameter of the model is frozen", "transfer.freeze", "lower transfer.freeze"))
    trained = {name for name, parameter in parameters.items() if name not in names and parameter.is_floating_point()}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    for name, parameter in parameters.items():
        assert parameter.requires_grad == (name in trained), f"requires_grad of {name} is wrong"
    modules = [module for block in frozen for module in block.modules]
    # The code of modules around layers may drop out the output of the stem.
    around = blocks.containers if depth.stem else ()
    return Frozen(depth, names, (*modules, *around))
