"""Numbers and values as text: rounded to significant digits, with units."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from orchestrator.formatting import format_duration

MISSING = "\N{EN DASH}"
_LARGEST = 1e100
_LATEST_MOMENT = 1e11
_EXPONENT = re.compile(r"e([+-])0*(\d)")


def number(value: Any) -> float | None:
    """Return a value as a number if it can be drawn, otherwise None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Also False for NaN.
    return float(value) if -_LARGEST < value < _LARGEST else None


def compact(value: float) -> str:
    """Return a number with three significant digits: `5e-5`, `0.1`, `128`, `12,000`."""
    if value != 0 and abs(value) < 0.01:
        lead, power = f"{value:.2e}".split("e")
        return f"{lead.rstrip('0').rstrip('.')}e{int(power)}"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if abs(value) >= 1000 and abs(value) < 1e7:
        return f"{value:,.0f}"
    return shorten_exponent(f"{value:.3g}")


def shorten_exponent(text: str) -> str:
    """Return `5e-05` as `5e-5`."""
    return _EXPONENT.sub(lambda match: f"e{match[1].replace('+', '')}{match[2]}", text)


def metric(value: float | None) -> str:
    """Return a metric's value: four decimals where it is small, fewer where it is large."""
    if value is None:
        return MISSING
    size = abs(value)
    if value != 0 and (size < 1e-3 or size >= 1e6):
        return compact(value)
    return f"{value:.4f}" if size < 10 else f"{value:,.2f}"


def difference(value: float) -> str:
    """Return a difference of two metrics, always with its sign."""
    sign = "+" if value >= 0 else "\N{MINUS SIGN}"
    return f"{sign}{metric(abs(value))}"


def duration(seconds: float | None) -> str:
    """Return seconds as `0.42 s`, `8.3 s`, `2 min 5 s`, `3 h 20 min`."""
    return MISSING if seconds is None else format_duration(seconds)


def moment(seconds: float | None) -> str | None:
    """Return seconds since 1970 as `2026-09-21 14:13 UTC`; None if they are not a valid date."""
    if seconds is None or not 0 <= seconds < _LATEST_MOMENT:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def tenths(seconds: float) -> str:
    """Return seconds for a column: `9.7`, `1,204.0`."""
    return f"{seconds:,.1f}"


def plain(value: Any) -> str:
    """Return a recipe's value as a user would write it: `none`, `5e-5`, `50%`, `type: lora, r: 16`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {plain(item)}" for name, item in value.items()) or "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(plain(item) for item in value)}]"
    amount = number(value)
    if amount is None:
        return str(value)
    return str(value) if isinstance(value, int) else compact(amount)
