"""The page of a search: what won and by how much, what was tried, what it cost, what failed."""

from __future__ import annotations

from collections import Counter
from statistics import mean, median

from orchestrator.formatting import format_bytes, format_count
from orchestrator.report.analysis import spread
from orchestrator.report.charts.base import View
from orchestrator.report.charts.cost import cost
from orchestrator.report.charts.depth_rate import depth_rate
from orchestrator.report.charts.history import history
from orchestrator.report.charts.parallel import parallel
from orchestrator.report.charts.progress import progress
from orchestrator.report.charts.single import single
from orchestrator.report.class_sections import class_sections
from orchestrator.report.markup import Child, Markup, element, escape, join
from orchestrator.report.numbers import difference, duration, metric, moment, number, plain
from orchestrator.report.page import (
    banner,
    code,
    figures,
    folded,
    header,
    kicker,
    listed,
    page,
    section,
    sentence,
    tiles,
)
from orchestrator.report.records import Search, Trial, texts_of
from orchestrator.report.tables import pairs
from orchestrator.report.trial_tables import failures, parameter_table, seed_scores, seed_table, trial_table

_STATES = {
    "running": "The search is still running; this is what has ended so far.",
    "interrupted": "The search was interrupted. Run the same command again to go on where it was.",
    "failed": "The search failed. The notes say why; run the same command again to go on where it was.",
}


def search_page(search: Search) -> str:
    """The HTML text."""
    view = View.of(search)
    charts = [chart(view) for chart in (depth_rate, single, parallel, history, progress, cost)]
    drawn = [chart for chart in charts if chart is not None]
    errors = class_sections(search.result, len(drawn) + 1, "The winner's classes on")
    name = str(search.recipe.get("name") or "search")
    state = _STATES.get(str(search.record.get("status")))
    failed = failures(search)
    notes = all_notes(search)
    parts = [
        header(kicker("Search", search.recipe), name, lead(search)),
        banner(state) if state else None,
        tiles(key_figures(search)),
        leader_section(search),
        section("What was tried", figures(drawn)) if drawn else None,
        section("Trials", sentence(trials_words(search)), trial_table(view)) if search.trials else None,
        *errors,
        section("Failures", failed) if failed else None,
        section("Notes", listed(notes)) if notes else None,
        circumstances(search),
    ]
    return page(f"{name}: search", [part for part in parts if part is not None])


def scores_of(search: Search) -> list[float]:
    return [trial.score for trial in search.ranked if trial.score is not None]


def lead_score(search: Search) -> float | None:
    """The winner's score on *select*; that of the best trial so far where no winner is named."""
    named = search.winner.select.get(search.metric) if search.winner else None
    return search.leader.score if named is None and search.leader else named


def lead(search: Search) -> Markup:
    """The result in one sentence."""
    score = lead_score(search)
    if search.leader is None or score is None:
        words = "No trial has a score yet." if search.record.get("status") == "running" else "No trial got a score."
        return escape(words)
    who = f"Trial {search.leader.id} " + ("wins with " if search.winner else "leads with ")
    parts: list[Child] = [who, element("strong", f"{search.metric} {metric(score)}"), " on select"]
    test = search.winner.test.get(search.metric) if search.winner else None
    if test is not None:
        parts += [" and ", element("strong", metric(test)), " on test"]
    scores = scores_of(search)
    if len(scores) > 1:
        gap = abs(score - median(scores))
        side = "better" if search.beats(score, median(scores)) else "worse"
        words = f"{metric(gap)} {side} than" if gap else "the same as"
        parts.append(f", {words} the median of {format_count(len(scores), 'trial')}")
    return join([*parts, "."])


def key_figures(search: Search) -> list[tuple[str, str, str]]:
    score, scores = lead_score(search), scores_of(search)
    test = search.winner.test.get(search.metric) if search.winner else None
    found = []
    if score is not None:
        found.append((f"{search.metric} on select", metric(score), "picks the winner"))
    if test is not None:
        found.append((f"{search.metric} on test", metric(test), "scored once, for the winner"))
    if score is not None and len(scores) > 1:
        found.append(("against the median", difference(score - median(scores)), f"median {metric(median(scores))}"))
    states = Counter(trial.status for trial in search.trials)
    remark = ", ".join(f"{amount:,} {state}" for state, amount in sorted(states.items()))
    if search.reruns:
        num_reruns = len(all_trials(search)) - len(search.trials)
        remark += f"; and {format_count(num_reruns, 'rerun')} with other seeds"
    found.append(("trials", f"{len(search.trials):,}", remark))
    if (seconds := number(search.record.get("seconds"))) is not None:
        found.append(("time", duration(seconds), at_a_time(search)))
    costs = [trial.core_seconds for trial in all_trials(search) if trial.core_seconds is not None]
    if costs:
        remark = f"{duration(median(costs))} a trial (median)" if len(costs) > 1 else ""
        found.append(("core time", duration(sum(costs)), remark))
    return found


def all_trials(search: Search) -> list[Trial]:
    """With the reruns."""
    return [*search.trials, *(trial for reruns in search.reruns.values() for trial in reruns)]


def at_a_time(search: Search) -> str:
    concurrent, cores = number(search.record.get("concurrent")), number(search.record.get("cores"))
    words = [
        f"{concurrent:.0f} at a time" if concurrent else "",
        f"on {format_count(int(cores), 'core')}" if cores else "",
    ]
    return " ".join(word for word in words if word)


def leader_section(search: Search) -> Markup | None:
    if search.leader is None:
        return None
    again = None
    if "best.yaml" in search.files:
        again = element("div", element("h3", "Train it again"), code("orchestrator train best.yaml"), links(search))
    parts = element(
        "div",
        element("div", element("h3", "Its parameters"), parameter_table(search)),
        element("div", again, seeds(search)),
        class_="columns",
    )
    return section("The winner" if search.winner else "The best so far", parts)


def links(search: Search) -> Markup:
    words = {"best.yaml": "the recipe", "model": "the trained model", "trials.jsonl": "all trials as JSON lines"}
    found = [join([element("a", name, href=name), f", {text}"]) for name, text in words.items() if name in search.files]
    return element("p", "In this folder: ", join(found, "; "), ".", class_="remark")


def seeds(search: Search) -> Markup | None:
    """How much scores depend on the seed, and how many trials are within that of the winner."""
    found = seed_scores(search)
    if not found:
        return None
    parts = [element("h3", f"{search.metric} on select with other seeds"), seed_table(search, found)]
    if search.winner is not None and search.winner.id in found:
        parts.append(sentence(near_words(search, found[search.winner.id])))
    return element("div", *parts)


def near_words(search: Search, scores: list[float]) -> str:
    """How many other trials are as good as the winner, as far as its seeds can tell."""
    deviation = spread(scores)
    worst = mean(scores) - (deviation if search.higher_is_better else -deviation)
    others = [trial for trial in search.ranked if search.winner is None or trial.id != search.winner.id]
    near = sum(not search.beats(worst, trial.score or 0.0) for trial in others)
    verdict = f"{near:,} are" if near > 1 else "one is" if near else "none is"
    return (
        f"Of {format_count(len(others), 'other trial')}, {verdict} within a deviation of the winner's mean, or better."
    )


def trials_words(search: Search) -> str:
    words = "Best first; scores on select, at each trial's best evaluation."
    if len(search.trials) > 1:
        words += " A click on a heading sorts."
    return words


def all_notes(search: Search) -> list[str]:
    notes = [*texts_of(search.record.get("notes")), *texts_of(search.record.get("warnings"))]
    if search.num_unread:
        notes.append(f"{format_count(search.num_unread, 'line')} of trials.jsonl could not be read and is not shown.")
    return notes


def circumstances(search: Search) -> Markup:
    """On what it ran, and the recipe."""
    rows: list[tuple[Child, Child]] = []
    if (started := moment(number(search.record.get("started")))) is not None:
        rows.append(("started", started))
    for key in ("algorithm", "scheduler", "seed"):
        if (value := search.recipe.get(f"search.{key}")) is not None:
            rows.append((key, plain(value)))
    if search.num_layers is not None:
        rows.append(("layers of the model", f"{search.num_layers:,}"))
    if (words := describe_features(search)) is not None:
        rows.append(("stored features", words))
    machine = search.record.get("machine")
    items = machine.items() if isinstance(machine, dict) else [("machine", machine)] if machine else []
    rows += [(str(name).replace("_", " "), plain(value)) for name, value in items]
    recipe = folded("The recipe as run", code(search.recipe.text)) if search.recipe.text else None
    return section("How it was run", pairs(rows) if rows else None, recipe)


def describe_features(search: Search) -> str | None:
    """What the frozen blocks' stored outputs took, such as `1.2 GB at boundaries 3, 6; made in 12.0 s`."""
    features = search.record.get("features")
    if not isinstance(features, dict) or not features:
        return None
    size, seconds = number(features.get("bytes")), number(features.get("seconds"))
    boundaries = features.get("boundaries")
    words = format_bytes(size) if size is not None else "yes"
    if isinstance(boundaries, list) and boundaries:
        words += f" at {'boundary' if len(boundaries) == 1 else 'boundaries'} {', '.join(map(plain, boundaries))}"
    return words + (f"; made in {duration(seconds)}" if seconds is not None else "")
