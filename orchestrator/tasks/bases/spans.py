"""Spans of tagged words, and their scores, by the rules of seqeval (Nakayama 2018) in its default mode."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

OUTSIDE = "O"
_PREFIXED = re.compile(r"[BIES]-.+")


class Span(NamedTuple):
    """Words of one kind: those from `start` up to `end`."""

    kind: str
    start: int
    end: int


def has_prefixes(names: Iterable[str]) -> bool:
    """Whether tags say where a span begins (BIO, IOBES); otherwise words of one tag in a row are one span."""
    return all(_PREFIXED.fullmatch(name) for name in names if name != OUTSIDE)


def find_spans(tags: Sequence[str], prefixed: bool) -> list[Span]:
    """Return the spans of a text.

    A span begins at B or S, and at any other tag that cannot continue the one before: after O, E, S, or another kind.

    Args:
        tags: one a word.
        prefixed: whether tags begin with `B-`, `I-`, `E-` or `S-`; otherwise they are kinds.
    """
    spans: list[Span] = []
    before, last_kind = OUTSIDE, ""
    for word, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-") if prefixed else ("I", "", tag)
        if tag == OUTSIDE:
            before = OUTSIDE
            continue
        if prefix in ("B", "S") or before in (OUTSIDE, "E", "S") or kind != last_kind:
            spans.append(Span(kind, word, word + 1))
        else:
            spans[-1] = spans[-1]._replace(end=word + 1)
        before, last_kind = prefix, kind
    return spans


def span_scores(found: Sequence[Sequence[Span]], expected: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """Return precision, recall and F1 of the spans of each kind (`per_class`) and of all (micro-averaged, `overall`).

    A span is right where one of the same kind, start and end is expected.

    Args:
        found: spans of each text; `expected` those of the data.
    """
    right, given, wanted = (Counter[str]() for _ in range(3))
    for ours, theirs in zip(found, expected, strict=True):
        given.update(span.kind for span in ours)
        wanted.update(span.kind for span in theirs)
        right.update(span.kind for span in set(ours) & set(theirs))
    kinds = sorted(given.keys() | wanted.keys())
    return {
        "overall": _scores(right.total(), given.total(), wanted.total()),
        "per_class": {kind: _scores(right[kind], given[kind], wanted[kind]) for kind in kinds},
    }


def _scores(right: int, given: int, wanted: int) -> dict[str, float]:
    precision = right / given if given else 0.0
    recall = right / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1-score": f1, "support": wanted}
