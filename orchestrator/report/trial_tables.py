"""The tables of a search: all trials, the winner's parameters, its seeds, failures with their reasons."""

from __future__ import annotations

from collections import Counter
from statistics import mean

from markupsafe import Markup

from orchestrator.report.analysis import depth_order, standard_deviation
from orchestrator.report.charts.base import View, short_names
from orchestrator.report.charts.depth_rate import DEPTH
from orchestrator.report.markup import element, join
from orchestrator.report.numbers import MISSING, compact, metric, number, plain, tenths
from orchestrator.report.records import Search, Trial
from orchestrator.report.tables import Cell, Row, TableColumn, table, unbroken

_MOST_METRICS = 4
_MOST_VALUES_NAMED = 8
_MOST_IDS_NAMED = 6


def trial_table(view: View) -> Markup:
    """Return a table of all trials, those without a score last."""
    search = view.search
    names = short_names(search.searched)
    others = other_metrics(search)
    numeric = {path: is_numeric(search, path) for path in search.searched}
    has_seeds = len({trial.seed for trial in search.trials}) > 1
    columns = [
        TableColumn("trial"),
        TableColumn(search.metric, numeric=True),
        *(TableColumn(name, numeric=True) for name in others),
        *(TableColumn(names[path], numeric=numeric[path]) for path in search.searched),
        *([TableColumn("seed", numeric=True)] if has_seeds else []),
        TableColumn("epochs", numeric=True),
        TableColumn("seconds", numeric=True),
        TableColumn("core-seconds", numeric=True),
        TableColumn("status"),
    ]
    unscored = [trial for trial in search.trials if trial.score is None]
    trials = [*search.ranked, *unscored]
    rows: list[Row] = []
    for trial in trials:
        cells: Row = [
            trial.id,
            score_cell(view, trial),
            *(Cell(metric(trial.metrics.get(name)), trial.metrics.get(name)) for name in others),
            *(parameter_cell(search, trial, path, numeric[path]) for path in search.searched),
            *([amount_cell(trial.seed)] if has_seeds else []),
            amount_cell(trial.epochs),
            seconds_cell(trial.seconds),
            seconds_cell(trial.core_seconds),
            element("span", trial.status, title=trial.reason),
        ]
        rows.append(cells)
    leader = next((index for index, trial in enumerate(trials) if trial is search.leader), None)
    return table(columns, rows, sortable=len(trials) > 1, marked=leader)


def other_metrics(search: Search) -> list[str]:
    """Return the loss and the most common other metrics."""
    counts = Counter(name for trial in search.trials for name in trial.metrics if name != search.metric)
    common = [name for name, _ in counts.most_common() if name != "loss"][: _MOST_METRICS - 1]
    return [*(["loss"] if "loss" in counts else []), *common]


def is_numeric(search: Search, path: str) -> bool:
    values = [trial.parameters.get(path) for trial in search.trials]
    return path == DEPTH or all(value is None or number(value) is not None for value in values)


def score_cell(view: View, trial: Trial) -> Cell:
    if trial.score is None:
        return Cell(MISSING, None)
    swatch = element("i", class_=f"swatch c{view.step(trial)}")
    return Cell(join([swatch, metric(trial.score)]), trial.score)


def amount_cell(amount: float | None) -> Cell:
    return Cell(MISSING if amount is None else compact(amount), amount)


def seconds_cell(seconds: float | None) -> Cell:
    return Cell(MISSING if seconds is None else tenths(seconds), seconds)


def parameter_cell(search: Search, trial: Trial, path: str, numeric: bool) -> Cell:
    if path not in trial.parameters:
        return Cell(MISSING, None)
    value = trial.parameters[path]
    if path == DEPTH:
        # A finite number, which the page's script can sort.
        return Cell(plain(value), min(1e9, depth_order(value, search.num_layers)))
    amount = number(value)
    return Cell(plain(value), amount if numeric else plain(value))


def parameter_table(search: Search) -> Markup:
    """Return a table of the leader's parameters, with the values that were tried."""
    leader = search.leader
    assert leader is not None
    parameters = leader.parameters or (search.winner.parameters if search.winner else {})
    columns = [TableColumn("parameter"), TableColumn("value"), TableColumn("tried")]
    rows = []
    for path in [*search.searched, *(path for path in parameters if path not in search.searched)]:
        if path in parameters:
            rows.append(
                [
                    dotted(path),
                    element("strong", plain(parameters[path]), class_="unbroken"),
                    tried(search, path),
                ]
            )
    edges = [path for path in search.searched if at_edge(search, leader, path)]
    warning = None
    if edges:
        named = join([dotted(path) for path in edges], " and ")
        there = " at this depth" if DEPTH in search.searched else ""
        words = (
            f" {'is' if len(edges) == 1 else 'are'} at the end of what was tried{there}; a wider range may do better."
        )
        warning = element("p", named, words, class_="remark")
    return join([table(columns, rows, fitted=True), warning])


def dotted(path: str) -> Markup:
    """Return a path that may break after its dots."""
    first, *rest = path.split(".")
    return element("code", first, *(join([".", element("wbr"), part]) for part in rest))


def tried(search: Search, path: str) -> Markup | str:
    """Return the values of a parameter like `0, 2, 4, all`, or `1e-5 to 1e-3, 12 values`."""
    values = [trial.parameters[path] for trial in search.trials if path in trial.parameters]
    distinct = {repr(value): value for value in values}
    if len(distinct) <= _MOST_VALUES_NAMED:
        ordered = sorted(distinct.values(), key=lambda value: value_order(search, path, value))
        return unbroken(list(map(plain, ordered)))
    numbers = [amount for value in values if (amount := number(value)) is not None]
    if len(numbers) < len(values):
        return f"{len(distinct):,} values"
    return unbroken([f"{compact(min(numbers))} to {compact(max(numbers))}", f"{len(distinct):,} values"])


def value_order(search: Search, path: str, value: object) -> tuple[float, str]:
    if path == DEPTH:
        return depth_order(value, search.num_layers), plain(value)
    amount = number(value)
    return (float("-inf") if amount is None else amount), plain(value)


def at_edge(search: Search, leader: Trial, path: str) -> bool:
    """Whether the leader has the lowest or highest value of a numeric grid, among trials of its depth."""
    value = number(leader.parameters.get(path))
    if value is None or path == DEPTH:
        return False
    depth = plain(leader.parameters.get(DEPTH))
    peers = [trial for trial in search.ranked if plain(trial.parameters.get(DEPTH)) == depth]
    amounts = {amount for trial in peers if (amount := number(trial.parameters.get(path))) is not None}
    everywhere = [number(trial.parameters.get(path)) for trial in search.trials]
    # A random value occurs once, and says nothing by being the largest of a few.
    on_grid = everywhere.count(value) > 1 or len(search.searched) == 1
    return on_grid and len(amounts) >= 3 and value in (min(amounts), max(amounts))


def seed_scores(search: Search) -> dict[str, list[float]]:
    """Return scores on *select* of each trial that was trained with more than one seed, its own first."""
    found = {}
    for trial in search.ranked:
        again = [rerun.score for rerun in search.reruns.get(trial.id, []) if rerun.score is not None]
        found[trial.id] = [trial.score or 0.0, *again]
    if search.winner is not None and len(search.winner.seeds) > 1:
        found[search.winner.id] = [score for _, score in search.winner.seeds]
    return {id: scores for id, scores in found.items() if len(scores) > 1}


def seed_table(search: Search, found: dict[str, list[float]]) -> Markup:
    """Return a table of the trials that were trained with several seeds, the best mean first."""
    columns = [
        TableColumn("trial"),
        TableColumn("mean", numeric=True),
        TableColumn("deviation", numeric=True),
        TableColumn("scores"),
    ]
    sign = -1 if search.higher_is_better else 1
    ordered = sorted(found, key=lambda id: (sign * mean(found[id]), id))
    rows = [
        [id, metric(mean(found[id])), metric(standard_deviation(found[id])), unbroken(list(map(metric, found[id])))]
        for id in ordered
    ]
    winner = search.winner.id if search.winner else None
    return table(columns, rows, marked=ordered.index(winner) if winner in ordered else None, fitted=True)


def failures(search: Search) -> Markup | None:
    """Return a table of reasons with the trials that failed, the most frequent first; None without failures."""
    reruns = [trial for trials in search.reruns.values() for trial in trials]
    failed = [trial for trial in [*search.trials, *reruns] if trial.status == "failed"]
    if not failed:
        return None
    grouped: dict[str, list[str]] = {}
    for trial in failed:
        grouped.setdefault(trial.reason or "no reason was recorded", []).append(trial.id)
    rows = []
    for reason, ids in sorted(grouped.items(), key=lambda item: (-len(item[1]), item[0])):
        named = ", ".join(ids[:_MOST_IDS_NAMED])
        more = len(ids) - _MOST_IDS_NAMED
        rows.append(
            [
                f"{len(ids):,}",
                element("span", reason, class_="reason"),
                named + (f" and {more:,} more" if more > 0 else ""),
            ]
        )
    return table([TableColumn("trials", numeric=True), TableColumn("reason"), TableColumn("which")], rows)
