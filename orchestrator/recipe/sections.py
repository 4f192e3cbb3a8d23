"""What all sections of a recipe are made from: the base class, and the kinds of values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
Name = Annotated[
    str,
    Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", title="1 to 63 lower-case letters, digits and dashes, no dash first"),
]
Text = Annotated[str, Field(min_length=1)]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Every = Literal["epoch"] | PositiveInt
Values = Annotated[list[Any], Field(min_length=1, title="a list of one value or more")]
Range = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]],
    Field(min_length=2, max_length=2, title="two numbers, `[low, high]`"),
]
PositiveRange = Annotated[list[Positive], Field(min_length=2, max_length=2, title="two numbers above 0, `[low, high]`")]
WholeRange = Annotated[list[int], Field(min_length=2, max_length=2, title="two whole numbers, `[low, high]`")]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values do not change after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, validate_default=True
    )
