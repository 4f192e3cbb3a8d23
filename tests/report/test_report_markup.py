"""Nothing from data becomes markup, and colours can be told apart and written on."""

from __future__ import annotations

import pytest
from markupsafe import Markup

from orchestrator.report.colours import NUM_STEPS, Colours, contrast, scale_steps, text_colour
from orchestrator.report.markup import clean, element, escape, join


def test_text_is_escaped_wherever_it_is_put() -> None:
    hostile = "<script>\"'&"
    assert element("p", hostile) == "<p>&lt;script&gt;&#34;&#39;&amp;</p>"
    assert element("p", title=hostile) == '<p title="&lt;script&gt;&#34;&#39;&amp;"></p>'
    assert join([hostile, Markup("<b>")]) == escape(hostile) + Markup("<b>")


def test_markup_is_kept_and_escaped_once() -> None:
    inner = element("b", "a & b")
    assert element("p", inner, None, 3) == "<p><b>a &amp; b</b>3</p>"


def test_attributes_that_are_off_are_left_out() -> None:
    drawn = element("input", class_="a", data_key="1", hidden=True, title=None, open=False, x=2.04)
    assert drawn == '<input class="a" data-key="1" hidden x="2"></input>'
    assert element("br") == "<br>"


@pytest.mark.parametrize("text", ["\x00", "\x1b[2J", "a\u202eb", "\ud800", "\x9b"])
def test_characters_that_a_page_cannot_show_are_replaced(text: str) -> None:
    assert "\N{REPLACEMENT CHARACTER}" in clean(text)
    clean(text).encode()


def test_text_in_any_language_and_its_line_breaks_stay() -> None:
    assert clean("größer\n\t日本語 עברית") == "größer\n\t日本語 עברית"


def test_the_best_has_the_last_colour_whichever_way_is_better() -> None:
    up, down = Colours(worst=0.2, best=0.8), Colours(worst=3.0, best=1.0)
    assert (up.step(0.8), up.step(0.2), up.step(0.1), up.step(0.51)) == (NUM_STEPS - 1, 0, 0, NUM_STEPS // 2)
    assert (down.step(1.0), down.step(3.0), down.step(9.0)) == (NUM_STEPS - 1, 0, 0)
    assert Colours(0.5, 0.5).step(0.5) == NUM_STEPS - 1


@pytest.mark.parametrize("dark", [False, True])
def test_text_on_every_colour_is_readable(dark: bool) -> None:
    assert min(contrast(colour, text_colour(colour)) for colour in scale_steps(dark)) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
def test_lightness_runs_one_way_so_that_grey_print_and_colour_blind_eyes_see_the_order(dark: bool) -> None:
    against_black = [contrast(colour, "#000000") for colour in scale_steps(dark)]
    assert against_black == sorted(against_black, reverse=not dark)
    assert len(set(against_black)) == NUM_STEPS
