"""The page of a report: one file with its own style and script, which allows nothing else to load."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup

from orchestrator.report.charts.base import Chart
from orchestrator.report.colours import colour_rules
from orchestrator.report.markup import Child, join, render
from orchestrator.report.records import RecipeText


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    heading: str
    content: Markup


@dataclass(frozen=True)
class Page:
    """The content of a page, from top to bottom."""

    title: str
    kicker: str
    """The line above the heading."""
    heading: str
    lead: Markup
    """The result in one sentence."""
    banner: str | None
    """A sentence about a state that is not final."""
    key_figures: Sequence[tuple[str, str, str]]
    """Name, value, remark."""
    sections: Sequence[Section]
    notes: Sequence[str]
    facts: Sequence[tuple[str, Child]]
    """Names and values that describe how it was run."""
    recipe: str
    """The text of the recipe; empty if there is none."""

    def render(self) -> str:
        """Return the HTML text."""
        style = Markup(read_file("page.css") + "\n" + colour_rules())
        script = Markup(read_file("sort.js"))
        text = render("page.html", page=self, style=style, script=script, policy=content_policy(style, script))
        return f"{text}\n"


def content_policy(style: str, script: str) -> str:
    """Return a content security policy that allows this style and script, by their hashes, and nothing else."""
    return (
        f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def digest(text: str) -> str:
    """Return the hash of a text as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def read_file(name: str) -> str:
    """Return the text of a file of this package."""
    return (files("orchestrator.report") / name).read_text(encoding="utf-8")


def kicker(kind: str, recipe: RecipeText) -> str:
    """Return the line above the heading: the kind of the page, the task, the source."""
    words = [kind, recipe.get("target.task"), recipe.get("source.model")]
    return " \N{MIDDLE DOT} ".join(str(word) for word in words if word)


def section(heading: str, *parts: Markup | None) -> Section | None:
    """Return a section with these parts; None if there are none."""
    return Section(heading, join(parts)) if any(parts) else None


def figures(charts: Sequence[Chart], first: int = 1) -> Markup:
    """Return charts, numbered from `first`; those of half width in pairs, an odd last one over the whole width."""
    ordered = in_pairs(charts)
    halves = [index for index, chart in enumerate(ordered) if not chart.full_width]
    alone = halves[-1] if len(halves) % 2 else None
    classes = ["full" if chart.full_width else "alone" if index == alone else "" for index, chart in enumerate(ordered)]
    return render("figures.html", charts=list(zip(ordered, classes, strict=True)), first=first)


def in_pairs(charts: Sequence[Chart]) -> list[Chart]:
    """Return the charts in their order, but each of half width is followed by the next one of half width."""
    left, ordered = list(charts), list[Chart]()
    while left:
        chart = left.pop(0)
        partner = next((other for other in left if not other.full_width), None)
        ordered.append(chart)
        if not chart.full_width and partner is not None:
            left.remove(partner)
            ordered.append(partner)
    return ordered
