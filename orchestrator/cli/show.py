"""Print problems, tables and results in a terminal. Control characters in text from data are replaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.errors import Problem
from orchestrator.formatting import format_bytes, format_count, format_duration
from orchestrator.recipe import Recipe, show_path
from orchestrator.storage import is_url, join

if TYPE_CHECKING:
    from orchestrator.cli.doctor import Finding
    from orchestrator.launch.train import Run
    from orchestrator.planning import Machine
    from orchestrator.planning.plan import TrainingPlan
    from orchestrator.search.estimate import Estimate
    from orchestrator.search.run import SearchRun
    from orchestrator.training.prepare import Prepared
    from orchestrator.training.preview import Preview


def clean(text: str) -> str:
    """Replace control characters, such as terminal escapes, but not line breaks and tabs."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def problems(found: Iterable[Problem], out: TextIO) -> None:
    for problem in found:
        out.write(f"{'error' if problem.fatal else 'warning'}: {clean(str(problem))}\n")


def table(rows: Sequence[Sequence[str]], out: TextIO) -> None:
    """Print rows in columns of equal width; the last column has any width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)] if rows else []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        out.write(clean("  ".join([*cells, row[-1]])).rstrip() + "\n")


def validated(prepared: Prepared, out: TextIO) -> None:
    recipe = prepared.recipe
    counts = ", ".join(f"{len(split):,} {name}" for name, split in prepared.examples.items())
    table(
        [
            ("recipe", f"{recipe.name} is valid"),
            ("source", prepared.source.name),
            ("task", f"{recipe.target.task}, {prepared.task.describe()}"),
            *([("labels", prepared.task.decision)] if prepared.task.decision else []),
            ("data", counts),
        ],
        out,
    )


def previewed(found: Preview, out: TextIO) -> None:
    """Print examples with their learned parts marked, by colour in a terminal or by brackets; then all lengths."""
    begin, end = ("\033[32m", "\033[0m") if out.isatty() else ("[[", "]]")
    for example in found.examples:
        out.write(f"{clean(example.where)}: {example.length:,} tokens, {example.num_targets:,} learned\n")
        for text, is_learned in example.segments:
            out.write(f"{begin}{clean(text)}{end}" if is_learned else clean(text))
        out.write("\n\n" if example.segments else "")
    rows = [
        (
            name,
            f"{split.examples:,} examples of {split.shortest:,} to {split.longest:,} tokens, median {split.median:,}; "
            f"{split.targets:,} of {split.tokens:,} learned; {split.num_longest:,} of the longest length",
        )
        for name, split in found.splits.items()
    ]
    table([*rows, ("padding", f"{found.padding:.1%} of the positions in training")], out)


def trained(recipe: Recipe, run: Run, out: TextIO) -> None:
    """Print the table at the end of a training."""
    result = run.result
    counts = result["parameters"]
    frozen = counts["total"] - counts["trained"]
    rows = [
        ("source", recipe.source.model),
        ("parameters", f"{counts['trained']:,} trained, {frozen:,} frozen"),
        (
            "training",
            f"{result['steps']} steps in {result['seconds']:.1f} s"
            + (f", {format_bytes(result['peak_bytes'])} at most in a worker" if result.get("peak_bytes") else "")
            + (f", stopped early: {result['stopped_early']}" if result["stopped_early"] else ""),
        ),
        ("best", f"step {result['best_step']} by {result['metric']} on select"),
    ]
    rows += scores_of(result)
    place = run.place if is_url(run.place) else show_path(run.directory)
    rows += [("model", join(place, "model")), ("everything else", place)]
    if run.resumed:
        rows.insert(0, ("resumed", "from an earlier run in this directory; --fresh starts over"))
    table(rows, out)


def searched(recipe: Recipe, found: SearchRun, out: TextIO) -> None:
    """Print the table at the end of a search."""
    winner, record = found.record["winner"], found.record
    counts = ", ".join(f"{number} {status}" for status, number in found.counts.items())
    values = [f"{path} = {value}" for path, value in winner["parameters"].items()]
    rows = [
        ("source", recipe.source.model),
        ("trials", f"{counts}, in {format_duration(record['seconds'], whole=True)}"),
        ("winner", f"trial {winner['id']}: {', '.join(values)}"),
    ]
    if len(winner["seeds"]) > 1:
        scores = "  ".join(f"{seed['score']:.4f}" for seed in winner["seeds"])
        rows.append(("its seeds", f"{record['metric']} {scores} on select"))
    rows += scores_of(found.result)
    here = show_path(found.directory)
    rows += [("model", f"{here}/model"), ("recipe", f"{here}/best.yaml"), ("report", f"{here}/report.html")]
    table(rows, out)


def estimated(recipe: Recipe, expected: Estimate, out: TextIO) -> None:
    """Print the estimate of a search."""
    rows = [
        ("trials", f"{expected.trials}, {expected.concurrent} at a time"),
        ("time", f"about {format_duration(expected.seconds, whole=True)} on this machine"),
        (
            "disk",
            f"{format_bytes(expected.cache_bytes)} for features, {format_bytes(expected.disk_bytes)} for the search",
        ),
        ("free", f"{format_bytes(expected.free_bytes)}"),
    ]
    table([*rows, *[("note", note) for note in expected.notes]], out)


def planned(found: TrainingPlan, out: TextIO) -> None:
    """Print a plan: the resources of a training, and other ways to distribute it."""
    recipe, machine, chosen = found.recipe, found.machine, found.chosen
    adjective = "fits" if chosen.fits else "DOES NOT FIT"
    passes = "one pass" if found.passes == 1 else f"up to {found.passes} passes"
    needed = format_bytes(chosen.memory.total)
    parts = ", ".join(f"{name} {format_bytes(each)}" for name, each in chosen.memory.parts.items())
    rows = [
        ("model", f"{found.total / 1e6:,.1f} M weights, {found.trained / 1e6:,.1f} M trained, in {found.precision}"),
        ("runs on", f"{format_count(recipe.scale.workers, 'worker')}; {places_of(machine)}"),
        ("passes", f"{found.micro_batch} examples in each, {passes} a step, at most {found.longest:,} positions"),
        ("memory", f"{needed} of the {format_bytes(found.room)} that a worker may take: {adjective}"),
        ("", parts),
        ("main memory", describe_main_memory(found)),
        ("time", describe_time(found)),
        ("disk", describe_disk(found)),
        ("network", f"{format_bytes(chosen.network)} sent by each worker in a step"),
        ("at a time", format_count(found.concurrent, "training") + " like this one"),
    ]
    table([*rows, *[("note", note) for note in found.notes]], out)
    out.write("\nother ways to distribute the training, with the same passes:\n")
    lines = [("  zero_stage", "offload", "memory", "main memory", "network", "")]
    for option in found.options:
        own = (option.zero_stage, option.offload) == (recipe.scale.zero_stage, recipe.scale.offload)
        judged = ("fits" if option.fits else "does not fit") + (", as in the recipe" if own else "")
        memory = option.memory
        total = ("> " if option.at_least else "") + format_bytes(memory.total)
        numbers = (total, format_bytes(memory.main), format_bytes(option.network))
        lines.append((f"  {option.zero_stage}", option.offload, *numbers, judged))
    table(lines, out)
    if found.advice:
        out.write("\nit would fit with:\n")
        table([(f"  {place}:", str(value).lower()) for place, value in found.advice.items()], out)
    elif not chosen.fits:
        out.write("\nnone of these fits: use more workers, an adapter, or devices with more memory\n")


def places_of(machine: Machine) -> str:
    """Return the machines and their devices in words."""
    return (
        f"{format_count(machine.nodes, 'machine')} with {format_count(machine.devices, 'place')} each ({machine.name})"
    )


def describe_time(found: TrainingPlan) -> str:
    cost = found.compute_cost
    throughput = f"{cost.seconds_a_step:.2g} s a step (at {cost.basis}: {cost.rate / 1e12:.3g} TFLOP/s a worker)"
    if cost.seconds is None or found.steps is None:
        return throughput
    return f"about {format_duration(cost.seconds, whole=True)} for {format_count(found.steps, 'step')}, {throughput}"


def describe_main_memory(found: TrainingPlan) -> str:
    loading = f"{format_bytes(found.loading_bytes)} of each machine while the model is loaded"
    return f"{loading}, {format_bytes(found.model_bytes)} of the first one while it is written"


def describe_disk(found: TrainingPlan) -> str:
    kept = found.recipe.train.keep + 2  # And the best one, and one that is being written.
    checkpoints = f"{format_bytes(found.checkpoint_bytes)} a checkpoint, up to {kept} at a time"
    cached = "" if found.cache_bytes is None else f", {format_bytes(found.cache_bytes)} of stored features"
    return f"{checkpoints}, {format_bytes(found.model_bytes)} for the model{cached}"


def scores_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a row for each evaluated split, and one for the scores of the last split before training, if known."""
    found = dict(result["metrics"])
    last = list(found)[-1]
    if (result.get("before") or {}).get(last):
        found[f"{last} before"] = result["before"][last]
    shown = (*result["metrics_shown"], "loss")
    return [
        (split, "  ".join(f"{name} {metrics[name]:.4f}" for name in shown if name in metrics))
        for split, metrics in found.items()
    ]


def evaluated(found: dict[str, Any], out: TextIO) -> None:
    rows = [("model", found["model"]), ("data", f"{found['data']}, {found['examples']:,} examples")]
    rows += [(name, f"{value:.4f}") for name, value in found["metrics"].items()]
    table(rows, out)


def tasks_evaluated(found: dict[str, Any], out: TextIO) -> None:
    """Print a row for each task of the harness, with the standard errors of its metrics."""
    details = found["details"]
    how = [f"lm-evaluation-harness {details['lm_eval']}", f"{found['examples']:,} examples"]
    how += ["with the chat template"] if details["chat_template"] else []
    rows = [("model", found["model"]), ("tasks", ", ".join(how))]
    for task, metrics in found["metrics"].items():
        errors = {name.replace("_stderr", ""): value for name, value in metrics.items() if "_stderr" in name}
        scores = [
            f"{name} {value:.4f}" + (f" \N{PLUS-MINUS SIGN} {errors[name]:.4f}" if name in errors else "")
            for name, value in metrics.items()
            if "_stderr" not in name
        ]
        rows.append((task, "  ".join(scores)))
    table(rows, out)


def findings(found: Sequence[Finding], out: TextIO) -> None:
    table(
        [(finding.name, finding.value + (f"\n    -> {finding.remedy}" if finding.remedy else "")) for finding in found],
        out,
    )
