"""Values from data, made fit for a message: shortened, and with nothing in them that a terminal would obey."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WIDTH = 60
NUM_SHOWN = 3


def show_value(value: object) -> str:
    """Return the value as one short printable line; text stands in double quotes.

    Control characters, terminal escapes and invisible ones are written as `\\x1b`, so that they cannot act.
    """
    if not isinstance(value, str):
        return _neutralise(str(value))
    return f'"{_neutralise(value)}"'


def show_name(name: str) -> str:
    """Return a column, class or file name from data, without quotes."""
    return _neutralise(name)


def show_names(names: Iterable[str]) -> str:
    """Names in a row, cut off after a dozen: `text, label, id and 30 more`."""
    every = [show_name(name) for name in names]
    return _join(every[:12], len(every))


def show_some(shown: Sequence[str], count: int) -> str:
    """Return up to three of `count` things: `a, b, c and 7 more`. `shown` holds at least the first three."""
    return _join(list(shown[:NUM_SHOWN]), count)


def _join(shown: list[str], count: int) -> str:
    more = count - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _neutralise(text: str) -> str:
    short = text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in short)
