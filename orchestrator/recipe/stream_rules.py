"""Rules for streamed data: the number of examples is limited, and nothing needs all of them."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.errors import RecipeError
from orchestrator.recipe.finding import Finding
from orchestrator.recipe.paths import resolve_path, split_count
from orchestrator.recipe.schema import Data, Recipe

_STREAM = "target.data.stream"


def find_stream_mistakes(recipe: Recipe) -> Iterator[Finding]:
    """Yield what `target.data.stream` cannot be combined with."""
    data, limit = recipe.target.data, recipe.target.limit
    if isinstance(data, str) or not data.stream:
        return
    if limit.train is None and recipe.train.steps is None:
        yield Finding(
            (_STREAM, "target.limit.train", "train.steps"),
            f"`{_STREAM}` reads no more examples than the run needs, and neither `target.limit.train` nor "
            "`train.steps` says how many",
            "set `target.limit.train` to a number of examples, or `train.steps`",
        )
    if limit.per_class is not None:
        yield Finding(
            ("target.limit.per_class", _STREAM),
            f"`target.limit.per_class` is {limit.per_class}, but with `{_STREAM}` not all examples of a class are seen",
            "set `target.limit.per_class` to null and `target.limit.train` to a number of examples",
        )
    for place, text in _train_files(data):
        if _has_count(text, recipe):
            yield Finding(
                (place, _STREAM),
                f"`{place}` draws from all of {text!r}, but with `{_STREAM}` not all of it is read",
                "remove the number; `target.data.weights` says how much of each file there is",
            )


def _train_files(data: Data) -> Iterator[tuple[str, str]]:
    if data.path is not None:
        yield "target.data.path", data.path
    elif isinstance(data.train, str):
        yield "target.data.train", data.train
    else:
        yield from ((f"target.data.train.{index}", file) for index, file in enumerate(data.train or []))


def _has_count(text: str, recipe: Recipe) -> bool:
    try:
        path = resolve_path(text, recipe.origin)
    except RecipeError:
        return False  # Reported by another rule.
    return path is not None and split_count(path)[1] is not None
