"""The page around a report: one file that holds its own style and script, and allows nothing else to load."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files

from orchestrator.report.charts.base import Chart
from orchestrator.report.colours import colour_rules
from orchestrator.report.markup import Child, Markup, element, join
from orchestrator.report.records import RecipeText


def page(title: str, parts: Iterable[Markup]) -> str:
    """The whole HTML text."""
    style = Markup(read_part("page.css") + "\n" + colour_rules())
    script = Markup(read_part("sort.js"))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    body = element("body", element("main", *parts), element("script", script))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def policy(style: str, script: str) -> str:
    """Only this style and this script, known by their hashes; no connection, frame, form or picture."""
    return (
        f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def read_part(name: str) -> str:
    return (files("orchestrator.report") / name).read_text(encoding="utf-8")


def kicker(what: str, recipe: RecipeText) -> str:
    """The line above the title: what the page is of, the task, the source."""
    words = [what, recipe.get("target.task"), recipe.get("source.model")]
    return " \N{MIDDLE DOT} ".join(str(word) for word in words if word)


def header(kicker: str, heading: str, lead: Child) -> Markup:
    return element(
        "header", element("p", kicker, class_="kicker"), element("h1", heading), element("p", lead, class_="lead")
    )


def banner(words: Child) -> Markup:
    return element("p", words, class_="banner", role="status")


def tiles(items: Sequence[tuple[str, str, str]]) -> Markup:
    """Key figures: (name, value, remark)."""
    drawn = [
        element("div", element("dt", name), element("dd", value), element("dd", remark, class_="remark"))
        for name, value, remark in items
    ]
    return element("dl", *drawn, class_="tiles")


def section(heading: str, *parts: Markup | None) -> Markup:
    return element("section", element("h2", heading), *parts)


def figures(charts: Sequence[Chart], first: int = 1) -> Markup:
    """Charts, numbered from `first`; those of half width in pairs, the last of an odd number over the whole width."""
    ordered = in_pairs(charts)
    halves = [index for index, chart in enumerate(ordered) if not chart.full_width]
    alone = halves[-1] if len(halves) % 2 else None
    drawn = [figure(first + index, chart, index == alone) for index, chart in enumerate(ordered)]
    return element("div", *drawn, class_="figures")


def in_pairs(charts: Sequence[Chart]) -> list[Chart]:
    """The charts in their order, but each of half width brings its partner, the next of half width, with it."""
    left, ordered = list(charts), list[Chart]()
    while left:
        chart = left.pop(0)
        partner = next((other for other in left if not other.full_width), None)
        ordered.append(chart)
        if not chart.full_width and partner is not None:
            left.remove(partner)
            ordered.append(partner)
    return ordered


def figure(number: int, chart: Chart, alone: bool) -> Markup:
    caption = element("figcaption", element("strong", f"Figure {number}. {chart.title}."), Markup(" "), chart.caption)
    picture = element("div", chart.drawing, class_="picture") if chart.drawing else None
    key = element("div", chart.key, class_="key-line") if chart.key else None
    below = element("div", chart.below, class_="below") if chart.below else None
    class_ = "full" if chart.full_width else "alone" if alone else None
    return element("figure", element("div", key, picture, caption), below, class_=class_)


def listed(items: Iterable[Child]) -> Markup:
    return element("ul", *(element("li", item) for item in items))


def code(text: str) -> Markup:
    return element("pre", element("code", text))


def folded(summary: str, *parts: Markup) -> Markup:
    return element("details", element("summary", summary), *parts)


def sentence(*parts: Child) -> Markup:
    return element("p", join(parts))
