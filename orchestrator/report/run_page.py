"""The page of one run: its scores, how it learned, where it errs, on what it ran."""

from __future__ import annotations

from orchestrator.formatting import format_count
from orchestrator.report.charts.training import training_charts
from orchestrator.report.class_sections import class_sections
from orchestrator.report.markup import Child, Markup, element, escape, join
from orchestrator.report.numbers import duration, metric, moment, number, plain
from orchestrator.report.page import banner, code, figures, folded, header, kicker, listed, page, section, tiles
from orchestrator.report.records import Run, as_dict, finite_values, texts_of
from orchestrator.report.tables import Column, pairs, table

LONGEST_ANSWER = 400  # Characters.
_STATES = {
    "running": "The run is not finished; this is what it has recorded so far.",
    "interrupted": "The run was interrupted. Run the same command again to go on from its last checkpoint.",
    "failed": "The run failed",
}


def run_page(run: Run) -> str:
    """The HTML text."""
    name = str(run.recipe.get("name") or "run")
    main = main_metric(run)
    charts = training_charts(run, main, number(run.result.get("best_step")))
    notes = [*texts_of(run.record.get("notes")), *texts_of(run.record.get("warnings"))]
    parts = [
        header(kicker("Run", run.recipe), name, lead(run, main)),
        state_banner(run),
        tiles(key_figures(run, main)),
        section("How it learned", figures(charts)) if charts else None,
        results(run),
        answers(run),
        *class_sections(run.result, len(charts) + 1, "Classes on"),
        section("Notes", listed(notes)) if notes else None,
        circumstances(run),
    ]
    return page(f"{name}: run", [part for part in parts if part is not None])


def main_metric(run: Run) -> str:
    """The metric that picked the best step; while there is no result, the recipe's or the first besides the loss."""
    named = run.result.get("metric") or run.recipe.get("train.early_stopping.metric")
    if isinstance(named, str):
        return named
    known = {"step", "epoch", "seconds", "loss"}
    found = [
        name for row in run.rows if row.get("split") == "select" for name in finite_values(row) if name not in known
    ]
    return found[0] if found else "loss"


def scores(run: Run) -> dict[str, dict[str, float]]:
    """Metrics of each reported split at the best step."""
    return {split: finite_values(values) for split, values in as_dict(run.result.get("metrics")).items()}


def lead(run: Run, main: str) -> Markup:
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


def state_banner(run: Run) -> Markup | None:
    if run.result:
        return None
    words = _STATES.get(str(run.record.get("status")), _STATES["running"])
    reason = run.record.get("reason")
    if run.record.get("status") == "failed":
        words += f": {reason}" if reason else "."
    return banner(words)


def key_figures(run: Run, main: str) -> list[tuple[str, str, str]]:
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
    """`22.7 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount:.0f}"


def results(run: Run) -> Markup | None:
    """All metrics of the splits, beside those before the first step where the head was kept."""
    columns: dict[str, dict[str, float]] = {}
    for split, before in as_dict(run.result.get("before")).items():
        columns[f"{split} before"] = finite_values(before)
    columns = dict(sorted({**columns, **scores(run)}.items()))
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    if not names:
        return None
    rows = [[name, *(metric(values.get(name)) for values in columns.values())] for name in names]
    return section(
        "Scores", table([Column("metric"), *(Column(name, numeric=True) for name in columns)], rows, fitted=True)
    )


def answers(run: Run) -> Markup | None:
    """What the model wrote, beside the answers in the data."""
    given = run.result.get("samples")
    found = [sample for sample in given if isinstance(sample, dict)] if isinstance(given, list) else []
    if not found:
        return None
    shown = {"source": "example", "expected": "in the data", "before": "before", "written": "after"}
    keys = [key for key in shown if any(sample.get(key) is not None for sample in found)]
    found = [{**sample, "source": str(sample.get("source")).rpartition("/")[2]} for sample in found]
    rows = [[shorten(str(sample.get(key) or "")) for key in keys] for sample in found]
    return section("Answers", table([Column(shown[key]) for key in keys], rows))


def shorten(text: str) -> str:
    return text if len(text) <= LONGEST_ANSWER else f"{text[:LONGEST_ANSWER]} ..."


def circumstances(run: Run) -> Markup:
    """On what it ran, and the recipe."""
    rows: list[tuple[Child, Child]] = []
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
    recipe = folded("The recipe as run", code(run.recipe.text)) if run.recipe.text else None
    return section("How it was run", pairs(rows) if rows else None, recipe)
