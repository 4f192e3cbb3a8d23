"""The page of a search: what won and by how much, what was tried, what it cost, what failed."""

from __future__ import annotations

from collections import Counter
from statistics import mean, median

from markupsafe import Markup

from orchestrator.formatting import format_bytes, format_count
from orchestrator.report.analysis import standard_deviation
from orchestrator.report.charts.base import View
from orchestrator.report.charts.cost import cost
from orchestrator.report.charts.depth_rate import depth_rate
from orchestrator.report.charts.history import history
from orchestrator.report.charts.parallel import parallel
from orchestrator.report.charts.progress import progress
from orchestrator.report.charts.single import single
from orchestrator.report.class_sections import class_sections
from orchestrator.report.markup import Child, element, escape, join, render
from orchestrator.report.numbers import difference, duration, metric, moment, number, plain
from orchestrator.report.page import Page, figures, kicker, section
from orchestrator.report.records import Search, Trial, texts_of
from orchestrator.report.trial_tables import failures, parameter_table, seed_scores, seed_table, trial_table

_STATES = {
    "running": "The search is still running; this is what has ended so far.",
    "interrupted": "The search was interrupted. Run the same command again to go on where it was.",
    "failed": "The search failed. The notes say why; run the same command again to go on where it was.",
}


def search_page(search: Search) -> str:
    """Return the HTML text of the page."""
    view = View.of(search)
    charts = [chart(view) for chart in (depth_rate, single, parallel, history, progress, cost)]
    drawn = [chart for chart in charts if chart is not None]
    errors = class_sections(search.result, len(drawn) + 1, "The winner's classes on")
    name = str(search.recipe.get("name") or "search")
    sections = [
        section("The winner" if search.winner else "The best so far", leader_details(search)),
        section("What was tried", figures(drawn)) if drawn else None,
        section("Trials", element("p", trials_words(search)), trial_table(view)) if search.trials else None,
        *errors,
        section("Failures", failures(search)),
    ]
    return Page(
        title=f"{name}: search",
        kicker=kicker("Search", search.recipe),
        heading=name,
        lead=lead(search),
        banner=_STATES.get(str(search.record.get("status"))),
        key_figures=key_figures(search),
        sections=[each for each in sections if each is not None],
        notes=all_notes(search),
        facts=facts(search),
        recipe=search.recipe.text,
    ).render()


def scores_of(search: Search) -> list[float]:
    return [trial.score for trial in search.ranked if trial.score is not None]


def lead_score(search: Search) -> float | None:
    """Return the winner's score on *select*; without a winner, that of the best trial so far."""
    named = search.winner.select.get(search.metric) if search.winner else None
    return search.leader.score if named is None and search.leader else named


def lead(search: Search) -> Markup:
    """Return the result in one sentence."""
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
    """Return the most important figures as name, value, remark."""
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
    """Return all trials and reruns."""
    return [*search.trials, *(trial for reruns in search.reruns.values() for trial in reruns)]


def at_a_time(search: Search) -> str:
    concurrent, cores = number(search.record.get("concurrent")), number(search.record.get("cores"))
    words = [
        f"{concurrent:.0f} at a time" if concurrent else "",
        f"on {format_count(int(cores), 'core')}" if cores else "",
    ]
    return " ".join(word for word in words if word)


def leader_details(search: Search) -> Markup | None:
    """Return the parameters of the best trial, its files, and how much scores depend on the seed."""
    if search.leader is None:
        return None
    words = {"best.yaml": "the recipe", "model": "the trained model", "trials.jsonl": "all trials as JSON lines"}
    files = [(name, text) for name, text in words.items() if name in search.files]
    found = seed_scores(search)
    has_other_seeds = search.winner is not None and search.winner.id in found
    return render(
        "leader.html",
        metric=search.metric,
        parameters=parameter_table(search),
        files=files if "best.yaml" in search.files else [],
        seeds=seed_table(search, found) if found else None,
        comparison=near_words(search, found[search.winner.id]) if search.winner and has_other_seeds else None,
    )


def near_words(search: Search, scores: list[float]) -> str:
    """Return how many other trials are within a standard deviation of the winner, among its seeds."""
    deviation = standard_deviation(scores)
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


def facts(search: Search) -> list[tuple[str, Child]]:
    """Return names and values that describe how it was run."""
    rows: list[tuple[str, Child]] = []
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
    return rows


def describe_features(search: Search) -> str | None:
    """Return what the stored features cost, such as `1.2 GB at boundaries 3, 6; made in 12.0 s`."""
    features = search.record.get("features")
    if not isinstance(features, dict) or not features:
        return None
    size, seconds = number(features.get("bytes")), number(features.get("seconds"))
    boundaries = features.get("boundaries")
    words = format_bytes(size) if size is not None else "yes"
    if isinstance(boundaries, list) and boundaries:
        words += f" at {'boundary' if len(boundaries) == 1 else 'boundaries'} {', '.join(map(plain, boundaries))}"
    return words + (f"; made in {duration(seconds)}" if seconds is not None else "")
