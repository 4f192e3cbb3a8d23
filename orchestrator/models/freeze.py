"""Freeze the lowest blocks of a model: no gradients, and no change of behaviour in training mode either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from orchestrator.errors import ModelError, Problem
from orchestrator.models.blocks import Block, Blocks


@dataclass(frozen=True)
class Depth:
    """What is frozen: nothing; or the stem, this many layers, and perhaps the tail."""

    stem: bool
    num_layers: int
    tail: bool

    def frozen_blocks(self, blocks: Blocks) -> tuple[Block, ...]:
        """The frozen ones of a model's blocks, lowest first."""
        return (
            *((blocks.stem,) if self.stem else ()),
            *blocks.layers[: self.num_layers],
            *((blocks.tail,) if self.tail else ()),
        )


@dataclass(frozen=True)
class Frozen:
    """The frozen part of a model. It holds the modules themselves, so wrappers around the model change nothing."""

    depth: Depth
    parameters: frozenset[str]
    """Names as they were when the model was frozen."""
    modules: tuple[nn.Module, ...]

    def set_train_mode(self, model: nn.Module) -> None:
        """Training mode for all but the frozen modules: no dropout and no new batch-norm statistics in those."""
        model.train()
        for module in self.modules:
            # Not `eval()`, which would reach into modules that are not frozen: a stem module may hold layers.
            module.training = False


def resolve_depth(freeze: int | str, num_layers: int, where: str | None = None) -> Depth:
    """The freeze depth that a recipe asks for, in a model with this many layers.

    `0` (and `0%`) freezes nothing; `stem` the stem; `k` the stem and k layers; `50%` the stem and half of the layers,
    rounded down; `all` all but the head.

    Args:
        where: place of the value, for messages.

    Raises:
        ModelError: the model has fewer layers.
    """
    if freeze == "all":
        return Depth(stem=True, num_layers=num_layers, tail=True)
    if freeze == "stem":
        return Depth(stem=True, num_layers=0, tail=False)
    if isinstance(freeze, str):
        percent = int(freeze.removesuffix("%"))
        return Depth(stem=percent > 0, num_layers=num_layers * percent // 100, tail=False)
    if freeze > num_layers:
        remedy = f"set transfer.freeze to {num_layers} or less, or to all"
        what = f"freeze depth is {freeze}, but the model has {num_layers} layers"
        raise ModelError(Problem(what, where, remedy))
    return Depth(stem=freeze > 0, num_layers=freeze, tail=False)


def freeze_blocks(model: Any, blocks: Blocks, depth: Depth) -> Frozen:
    """Set `requires_grad` of every parameter: off in the frozen blocks and of weights in 4 bits, on everywhere else.

    Raises:
        ModelError: nothing is left to train.
    """
    frozen_blocks = depth.frozen_blocks(blocks)
    names = frozenset(name for block in frozen_blocks for name in block.parameters)
    parameters = dict(model.named_parameters())
    if not parameters.keys() - names:
        raise ModelError(Problem("every parameter of the model is frozen", "transfer.freeze", "lower transfer.freeze"))
    trained = {name for name, parameter in parameters.items() if name not in names and parameter.is_floating_point()}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    for name, parameter in parameters.items():
        assert parameter.requires_grad == (name in trained), f"requires_grad of {name} is wrong"
    modules = [module for block in frozen_blocks for module in block.modules]
    # Modules around layers have code of their own, which may drop what the stem made.
    around = blocks.containers if depth.stem else ()
    return Frozen(depth, names, (*modules, *around))
