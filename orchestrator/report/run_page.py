"""The page of one run: its scores, how it learned, its errors, its machine."""

from __future__ import annotations

from markupsafe import Markup

from orchestrator.formatting import format_count
from orchestrator.report.charts.training import training_charts
from orchestrator.report.class_sections import class_sections
from orchestrator.report.markup import Child, element, escape, join
from orchestrator.report.numbers import duration, metric, moment, number, plain
from orchestrator.report.page import Page, figures, kicker, section
from orchestrator.report.records import Run, as_dict, finite_values, texts_of
from orchestrator.report.tables import TableColumn, table

MAX_CHARACTERS = 400
_STATES = {
    "running": "The run is not finished; this is what it has recorded so far.",
    "interrupted": "The run was interrupted. Run the same command again to go on from its last checkpoint.",
    "failed": "The run failed",
}


def run_page(run: Run) -> str:
    """Return the HTML text of the page."""
    name = str(run.recipe.get("name") or "run")
    main = main_metric(run)
    charts = training_charts(run, main, number(run.result.get("best_step")))
    sections = [
        section("How it learned", figures(charts)) if charts else None,
        section("Scores", score_table(run)),
        section("Answers", sample_table(run)),
        *class_sections(run.result, len(charts) + 1, "Classes on"),
    ]
    return Page(
        title=f"{name}: run",
        kicker=kicker("Run", run.recipe),
        heading=name,
        lead=lead(run, main),
        banner=state_of(run),
        key_figures=key_figures(run, main),
        sections=[each for each in sections if each is not None],
        notes=[*texts_of(run.record.get("notes")), *texts_of(run.record.get("warnings"))],
        facts=facts(run),
        recipe=run.recipe.text,
    ).render()


def main_metric(run: Run) -> str:
    """Return the metric that picked the best step; without a result, the recipe's or the first one besides the loss."""
    named = run.result.get("metric") or run.recipe.get("train.early_stopping.metric")
    if isinstance(named, str):
        return named
    known = {"step", "epoch", "seconds", "loss"}
    found = [
        name for row in run.rows if row.get("split") == "select" for name in finite_values(row) if name not in known
    ]
    return found[0] if found else "loss"


def scores(run: Run) -> dict[str, dict[str, float]]:
    """Return the metrics of each reported split at the best step."""
    return {split: finite_values(values) for split, values in as_dict(run.result.get("metrics")).items()}


def lead(run: Run, main: str) -> Markup:
    """Return the result in one sentence."""
    found = [(split, values[main]) for split, values in scores(run).items() if main in values]
    if not found:
        return escape("There are no scores yet." if not run.result else f"No split has a score for {main}.")
    parts: list[Child] = []
    for split, value in found[::-1]:
        shown = metric(value) if parts else f"{main} {metric(value)}"
        parts += [" and " if parts else "The run reaches ", element("strong", shown), f" on {split}"]
    best, last = number(run.result.get("best_step")), number(run.result.get("steps"))
    if best is not None and last is not None:
        parts.append(f", with the weights of step {best:,.0f} of {last:,.0f}")
    return join([*parts, "."])


def state_of(run: Run) -> str | None:
    """Return a sentence about a run that has not ended; None if it has a result."""
    if run.result:
        return None
    words = _STATES.get(str(run.record.get("status")), _STATES["running"])
    reason = run.record.get("reason")
    if run.record.get("status") == "failed":
        words += f": {reason}" if reason else "."
    return words


def key_figures(run: Run, main: str) -> list[tuple[str, str, str]]:
    """Return the most important figures as name, value, remark."""
    found = []
    for split, values in scores(run).items():
        if main in values:
            remark = {"select": "picks the best step", "test": "only reported"}.get(split, "")
            found.append((f"{main} on {split}", metric(values[main]), remark))
    if (steps := number(run.result.get("steps"))) is not None:
        stopped = run.result.get("stopped_early")
        found.append(("steps", f"{steps:,.0f}", f"stopped early: {stopped}" if stopped else ""))
    if (seconds := number(run.result.get("seconds"))) is not None:
        found.append(("training time", duration(seconds), workers(run)))
    counts = finite_values(run.result.get("parameters") or run.record.get("parameters"))
    if counts.get("total"):
        trained = counts.get("trained", 0.0)
        found.append(
            (
                "trained parameters",
                short_count(trained),
                f"{trained / counts['total']:.1%} of {short_count(counts['total'])}",
            )
        )
    return found


def workers(run: Run) -> str:
    size = number(run.record.get("world_size"))
    return "" if size is None else f"on {format_count(int(size), 'worker')}"


def short_count(amount: float) -> str:
    """Return an amount like `22.7 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount:.0f}"


def score_table(run: Run) -> Markup | None:
    """Return all metrics of the splits, with those before the first step if they were computed; None without any."""
    columns: dict[str, dict[str, float]] = {}
    for split, before in as_dict(run.result.get("before")).items():
        columns[f"{split} before"] = finite_values(before)
    columns = dict(sorted({**columns, **scores(run)}.items()))
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    if not names:
        return None
    rows = [[name, *(metric(values.get(name)) for values in columns.values())] for name in names]
    return table([TableColumn("metric"), *(TableColumn(name, numeric=True) for name in columns)], rows, fitted=True)


def sample_table(run: Run) -> Markup | None:
    """Return texts that the model generated, with those in the data; None without any."""
    given = run.result.get("samples")
    found = [sample for sample in given if isinstance(sample, dict)] if isinstance(given, list) else []
    if not found:
        return None
    shown = {"source": "example", "expected": "in the data", "before": "before", "written": "after"}
    keys = [key for key in shown if any(sample.get(key) is not None for sample in found)]
    found = [{**sample, "source": str(sample.get("source")).rpartition("/")[2]} for sample in found]
    rows = [[shorten(str(sample.get(key) or "")) for key in keys] for sample in found]
    return table([TableColumn(shown[key]) for key in keys], rows)


def shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."


def facts(run: Run) -> list[tuple[str, Child]]:
    """Return names and values that describe how it was run."""
    rows: list[tuple[str, Child]] = []
    if (started := moment(number(run.record.get("started")))) is not None:
        rows.append(("started", started))
    for key, words in (
        ("attempt", "attempts"),
        ("world_size", "workers"),
        ("precision", "precision"),
        ("machine", "machine"),
    ):
        if run.record.get(key) is not None:
            rows.append((words, plain(run.record[key])))
    versions = as_dict(run.record.get("versions"))
    if versions:
        rows.append(("versions", ", ".join(f"{name} {plain(value)}" for name, value in versions.items())))
    if isinstance(run.record.get("command"), list):
        rows.append(("command", element("code", " ".join(map(str, run.record["command"])))))
    return rows
