"""Common parts of charts: the chart itself, the colours of a search's scores, names and tooltips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from orchestrator.report.analysis import readable_range
from orchestrator.report.colours import Colours
from orchestrator.report.drawing import colour_key, curve
from orchestrator.report.numbers import duration, metric, plain
from orchestrator.report.records import Search, Trial

# With more trials there are no tooltips and most lines are grey, so that the page stays small, fast and readable.
MOST_SINGLE_SHAPES = 300
NUM_COLOURED = 60
HALF_WIDTH, FULL_WIDTH = 500.0, 1040.0


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and caption."""

    title: str
    drawing: Markup
    caption: Markup | str
    full_width: bool = False
    key: Markup | None = None
    below: Markup | None = None
    """A table that belongs to the drawing."""


@dataclass(frozen=True)
class View:
    """A search with the range of scores that are drawn to scale, and their colours."""

    search: Search
    low: float
    """Lowest score drawn to scale."""
    high: float
    colours: Colours

    @classmethod
    def of(cls, search: Search) -> View:
        scores = [trial.score for trial in search.ranked if trial.score is not None]
        low, high = readable_range(scores, search.higher_is_better) if scores else (0.0, 1.0)
        if not scores:
            return cls(search, low, high, Colours(low, high))
        # The median has the middle colour, so that differences within the better half are visible.
        best, middle = scores[0], median(scores)
        worst = 2 * middle - best if middle != best else scores[-1]
        worst = max(low, worst) if search.higher_is_better else min(high, worst)
        return cls(search, low, high, Colours(worst, best))

    @property
    def many(self) -> bool:
        return len(self.search.ranked) > MOST_SINGLE_SHAPES

    @property
    def score_title(self) -> str:
        return f"{self.search.metric} on select"

    def step(self, trial: Trial) -> int:
        return self.colours.step(trial.score or 0.0)

    def clamp(self, score: float) -> float:
        """Return the score, or the end of the range that it exceeds."""
        return min(self.high, max(self.low, score))

    def is_beyond(self, score: float) -> bool:
        return not self.low <= score <= self.high

    @property
    def radius(self) -> float:
        """Return the radius of a trial's point."""
        return 2.5 if self.many else 4.0

    def dot(self, trial: Trial) -> str:
        """Return the class of a trial's point."""
        return f"dot{' tiny' if self.many else ''} c{self.step(trial)}"

    def tip(self, trial: Trial) -> str | None:
        return None if self.many else describe(trial, self.search)

    def key(self) -> Markup:
        worst, best = metric(self.colours.worst), metric(self.colours.best)
        beyond = any(self.search.beats(self.colours.worst, trial.score or 0.0) for trial in self.search.ranked)
        sign = ("\N{LESS-THAN OR EQUAL TO}" if self.search.higher_is_better else "\N{GREATER-THAN OR EQUAL TO}") + " "
        return colour_key((sign if beyond else "") + worst, best, self.score_title)

    def beyond_note(self, scores: Iterable[float]) -> str:
        """Return a sentence about the scores that do not fit on the axis; empty without any."""
        num_beyond = sum(self.is_beyond(score) for score in scores)
        if num_beyond == 0:
            return ""
        side = f"below {metric(self.low)}" if self.search.higher_is_better else f"above {metric(self.high)}"
        return f" {num_beyond:,} {side} {'is' if num_beyond == 1 else 'are'} drawn at the edge."


def is_logarithmic(search: Search, path: str) -> bool | None:
    """Whether the recipe draws a parameter from a logarithmic range; None if it does not say."""
    domain = search.space.get(path)
    cases = [case for case in (domain if isinstance(domain, list) else [domain]) if isinstance(case, dict)]
    kinds = {kind for case in cases for kind, value in case.items() if value is not None}
    if "loguniform" in kinds:
        return True
    return False if kinds & {"uniform", "integers"} else None


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return the last part of each dotted path, or all of it where two end alike."""
    endings = Counter(path.rsplit(".", 1)[-1] for path in paths)
    return {path: ending if endings[ending := path.rsplit(".", 1)[-1]] == 1 else path for path in paths}


def describe_parameters(trial: Trial, search: Search) -> list[str]:
    """Return `freeze 3`, `learning_rate 5e-5`, ..."""
    names = short_names(search.searched)
    return [f"{names[path]} {plain(trial.parameters[path])}" for path in search.searched if path in trial.parameters]


def describe(trial: Trial, search: Search) -> str:
    """Return a trial in two lines, for tooltips."""
    parameters = ", ".join(describe_parameters(trial, search))
    cost = f" in {duration(trial.seconds)}" if trial.seconds is not None else ""
    return f"trial {trial.id}: {search.metric} {metric(trial.score)}{cost}\n{parameters}"


def trial_lines(view: View, trials: Sequence[Trial], shape: Callable[[Trial], str]) -> list[Markup]:
    """Return a line per trial (`shape` returns its path data), worst first so that the best ones are on top.

    Of many trials, only the best have a colour; the rest are one grey shape behind them.
    """
    order = list(trials)[::-1]
    behind = order[: len(order) - NUM_COLOURED] if view.many else []
    thin = " thin" if view.many else ""
    lines = [curve("".join(map(shape, behind)), "line behind")] if behind else []
    lines += [curve(shape(trial), f"line{thin} c{view.step(trial)}", view.tip(trial)) for trial in order[len(behind) :]]
    leader = view.search.leader
    if leader is not None and any(trial is leader for trial in trials):
        lines.append(curve(shape(leader), "line winner", view.tip(leader)))
    return lines


def lines_words(view: View) -> str:
    """Return how lines are coloured, for captions."""
    if view.many:
        return f"coloured by {view.score_title}: the best {NUM_COLOURED}, all others grey"
    return f"coloured by {view.score_title}"
