"""The section `transfer` of a recipe: what is frozen, adapted and added, in which phases, by which methods."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from orchestrator.recipe.freeze_depth import FreezeDepth, WrittenDepth
from orchestrator.recipe.sections import Fraction, Name, Positive, PositiveInt, Schedule, Section, Text


class Head(Section):
    """The task's new last layers."""

    layers: list[PositiveInt] = Field(default_factory=list)
    """Widths of extra hidden layers before the output layer, each with GELU and dropout."""
    dropout: Fraction = 0.1
    """Dropout before the output layer (and after each extra layer)."""
    learning_rate_multiplier: Positive = 1.0
    """The head learns at this multiple of `train.learning_rate`."""


class Adapter(Section):
    """Low-rank weights put into the trainable blocks; everything else in the body stays as it was."""

    type: Literal["lora"]
    """`lora` (Hu et al. 2021), through peft."""
    r: PositiveInt = 16
    """Rank."""
    alpha: Positive = 32
    """The adapter's output is scaled by alpha / r (alpha / sqrt(r) for `rslora`)."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | list[Text] = "all-linear"
    """`all-linear`, weights of experts included, or the last parts of module names, such as `[query, value]`."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """`rslora` (Kalajdzievski 2023) scales by alpha / sqrt(r); `dora` (Liu et al. 2024) learns magnitudes too."""
    init: Literal["zero", "pissa"] = "zero"
    """`zero` adds nothing at first; `pissa` (Meng et al. 2024) begins with the largest singular values of the weights,
    which is often quicker to learn, and is saved as a LoRA of twice the rank."""
    quantize: Literal["nf4"] | None = None
    """`nf4` holds the frozen linear weights in 4 bits (Dettmers et al. 2023, QLoRA); needs the extra `quant`."""
    modules_to_save: list[Text] = Field(default_factory=list)
    """Modules above the freeze boundary that are trained whole beside the adapter, by the last parts of their names:
    `[embed_tokens, lm_head]`."""


class Phase(Section):
    """A stretch of training with trained blocks, a length and a schedule of its own. What it leaves out is as the
    recipe has it elsewhere."""

    name: Name
    """Stands in each of the phase's rows of metrics.jsonl."""
    freeze: WrittenDepth | None = None
    """Freeze depth, as `transfer.freeze`; null for that one."""
    epochs: Positive | None = None
    """Passes over the training data; null with `steps`, or for `train.epochs`."""
    steps: PositiveInt | None = None
    """Optimizer steps; null with `epochs`, or for `train.steps`."""
    learning_rate: Positive | None = None
    """Peak rate; null for `train.learning_rate`."""
    schedule: Schedule | None = None
    """Shape of the rate over the steps of this phase; null for `train.schedule`."""
    warmup_ratio: Fraction | None = None
    """Share of this phase's steps over which the rate rises from 0; null for `train.warmup_ratio`."""


class MethodSettings(Section):
    """One of `transfer.methods`: its name, and its own options next to it."""

    model_config = ConfigDict(extra="allow")

    name: Text
    """Name of the method, such as `l2-sp`; `orchestrator schema --method NAME` lists its options."""

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options, which the method checks."""
        return dict(self.model_extra or {})


class Transfer(Section):
    """The transfer of knowledge from the source to the target."""

    from_scratch: bool = False
    """Random weights in the same architecture: the control that a transfer is held against."""
    freeze: WrittenDepth = 0
    """Freeze depth: `0` nothing, `stem` the embeddings, `k` the stem and k layers, `50%` half of the layers, `all` all
    but the head."""
    head: Head = Head()
    """The task's new last layers."""
    adapter: Adapter | None = None
    """Adapter weights in the blocks above the freeze boundary; null tunes the blocks themselves."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Each block learns at this multiple of the rate of the block above it (Howard & Ruder 2018); null for one rate."""
    phases: Annotated[list[Phase], Field(min_length=1, title="a list of one phase or more")] | None = None
    """Trainings one after the other, over one sequence of steps; null for one, of `train.epochs` or `train.steps`."""
    methods: list[MethodSettings] = Field(default_factory=list)
    """Further ways to move knowledge, any number: `[{name: l2-sp, weight: 0.01}]`."""

    @property
    def depth(self) -> FreezeDepth:
        """`freeze`, parsed."""
        return FreezeDepth.parse(self.freeze)
