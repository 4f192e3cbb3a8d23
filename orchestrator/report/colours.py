"""A colour scale from worst to best, for light and for dark pages, and the step of a score on it.

It runs from pale yellow-green over blue to navy, and the other way on dark pages, so the best always stands out most.
Lightness falls evenly along it, so it reads the same to colour-blind eyes and in grey print.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_STEPS = 12
_LIGHT = ("#dfe8c8", "#b2dcbd", "#79c6be", "#43a8be", "#2a83b4", "#275ca1", "#273c8a", "#1a1d5c")
_DARK = ("#2a3650", "#2c5076", "#2e7093", "#3f98ab", "#5fb2ae", "#93ceae", "#c8e6b1", "#f7fac9")
_INK, _PAPER = "#090c0f", "#ffffff"


@dataclass(frozen=True)
class Colours:
    """Maps scores between two ends to steps of the scale; scores beyond an end have its colour."""

    worst: float
    best: float

    def step(self, score: float) -> int:
        if self.best == self.worst:
            return NUM_STEPS - 1
        share = (score - self.worst) / (self.best - self.worst)
        return min(NUM_STEPS - 1, max(0, int(share * NUM_STEPS)))


def colour_rules() -> str:
    """Return CSS in which `.c0` to `.c11` set `--c`, the colour of a step, and `--on`, the colour of text on it."""
    light, dark = _rules(_LIGHT), _rules(_DARK)
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours (`#rrggbb`), from 1 to 21 (WCAG 2.2, relative luminance)."""
    brighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def scale_steps(dark: bool) -> list[str]:
    """Return the colours of all steps, worst first."""
    stops = _DARK if dark else _LIGHT
    return [_mix(stops, step / (NUM_STEPS - 1)) for step in range(NUM_STEPS)]


def text_colour(background: str) -> str:
    """Return the colour of text, dark or light, that is easier to read on a background."""
    return max(_INK, _PAPER, key=lambda colour: contrast(colour, background))


def _rules(stops: tuple[str, ...]) -> str:
    steps = scale_steps(dark=stops is _DARK)
    return "\n".join(f".c{step} {{ --c: {colour}; --on: {text_colour(colour)}; }}" for step, colour in enumerate(steps))


def _channels(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def _mix(stops: tuple[str, ...], share: float) -> str:
    position = share * (len(stops) - 1)
    index = min(int(position), len(stops) - 2)
    low, high = _channels(stops[index]), _channels(stops[index + 1])
    mixed = [round(a + (b - a) * (position - index)) for a, b in zip(low, high, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _luminance(colour: str) -> float:
    shares = [channel / 255 for channel in _channels(colour)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
