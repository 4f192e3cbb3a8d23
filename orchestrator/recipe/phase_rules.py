"""Rules for phases: each has a name and a length, and all of them train one and the same model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from orchestrator.recipe.finding import Finding
from orchestrator.recipe.schema import Data, Recipe, Train

PLACE = "transfer.phases"


def find_phase_mistakes(recipe: Recipe) -> Iterator[Finding]:
    """Find what is wrong with `transfer.phases`."""
    phases = recipe.transfer.phases or []
    counts = Counter(phase.name for phase in phases)
    for number, phase in enumerate(phases):
        place = f"{PLACE}.{number}"
        if counts[phase.name] > 1:
            what = f"{counts[phase.name]} phases have the name {phase.name!r}"
            yield Finding((f"{place}.name",), what, "give each a name of its own")
        if phase.epochs is not None and phase.steps is not None:
            what = f"the phase {phase.name!r} has both `epochs` and `steps`"
            yield Finding((f"{place}.steps", f"{place}.epochs"), what, "keep one of the two")
        yield from _one_model(recipe, number)
    if phases:
        yield from _lengths_are_used(recipe)


def _one_model(recipe: Recipe, number: int) -> Iterator[Finding]:
    transfer = recipe.transfer
    phase = (transfer.phases or [])[number]
    place = f"{PLACE}.{number}.freeze"
    if phase.freeze is None or phase.freeze == transfer.freeze:
        return
    if transfer.adapter is not None:
        yield Finding(
            (place, "transfer.adapter", "transfer.freeze"),
            f"`{place}` is {phase.freeze}, but an adapter lies above one freeze depth in all phases",
            "remove it, and set `transfer.freeze` to the depth of all phases",
        )
    if transfer.from_scratch and phase.freeze not in (0, "0%"):
        yield Finding(
            (place, "transfer.from_scratch"),
            f"`{place}` is {phase.freeze}, but `transfer.from_scratch` would freeze random weights",
            "set it to 0",
        )


def _lengths_are_used(recipe: Recipe) -> Iterator[Finding]:
    phases, train = recipe.transfer.phases or [], recipe.train
    # Every recipe that was written out in full has the default, so that one says nothing.
    given = {"steps": train.steps, "epochs": None if train.epochs == Train().epochs else train.epochs}
    if all(phase.epochs is not None or phase.steps is not None for phase in phases):
        for key, value in given.items():
            if value is not None:
                what = f"`train.{key}` is {value:g}, but each of `{PLACE}` gives its own length"
                remedy = f"remove `train.{key}`, or the length of the phases that it is for"
                yield Finding((f"train.{key}", PLACE), what, remedy)
    data = recipe.target.data
    if isinstance(data, Data) and data.stream and recipe.target.limit.train is None:
        yield Finding(
            (PLACE, "target.data.stream", "target.limit.train"),
            "`target.data.stream` reads as many examples as the steps of one phase take, but there are phases",
            "set `target.limit.train` to the number of examples",
        )
