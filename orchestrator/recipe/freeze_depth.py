"""The freeze depth: how many of a model's blocks are frozen, from the stem upwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

Percent = Annotated[str, Field(pattern=r"^(100|[1-9]?[0-9])%$", title="a percentage such as `50%`")]
WrittenDepth: TypeAlias = Literal["stem", "all"] | Annotated[int, Field(ge=0)] | Percent
"""A freeze depth as a recipe writes it."""


@dataclass(frozen=True)
class FrozenRange:
    """The frozen blocks of a model with a known number of layers."""

    stem: bool
    num_layers: int
    tail: bool


@dataclass(frozen=True)
class FreezeDepth:
    """A parsed freeze depth, for models of any number of layers."""

    stem: bool
    layers: int = 0
    """The number of frozen layers, where it does not depend on the model."""
    percent: int | None = None
    """The share of frozen layers, rounded down, where it depends on the model."""
    tail: bool = False

    @classmethod
    def parse(cls, written: int | str) -> FreezeDepth:
        """Parse `0` (nothing), `stem`, `k` (the stem and k layers), `50%` (the stem and half of the layers), or `all`
        (everything but the head).

        Raises:
            ValueError: it is none of these.
        """
        if written == "all":
            return cls(stem=True, percent=100, tail=True)
        if written == "stem":
            return cls(stem=True)
        if isinstance(written, str) and written.endswith("%") and written[:-1].isdigit():
            percent = int(written[:-1])
            return cls(stem=percent > 0, percent=percent)
        if isinstance(written, bool) or not isinstance(written, int) or written < 0:
            raise ValueError(f"{written!r} is not a freeze depth")
        return cls(stem=written > 0, layers=written)

    @property
    def freezes_nothing(self) -> bool:
        return not self.stem

    @property
    def freezes_body(self) -> bool:
        """Whether only the head is left to train."""
        return self.tail

    def resolve(self, num_layers: int) -> FrozenRange:
        """Return the blocks that are frozen in a model with this many layers; at most all of them."""
        layers = self.layers if self.percent is None else num_layers * self.percent // 100
        return FrozenRange(self.stem, min(layers, num_layers), self.tail)
