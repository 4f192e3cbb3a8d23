"""The commands that take a recipe, and reports: parse arguments, call the package, print the result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.cli import show
from orchestrator.storage import is_url

FRESH = "start over; the old directory is kept under another name"


def add_verbs(verb: Callable[..., Any], recipe: Any) -> None:
    """Add the commands to a parser.

    Args:
        verb: adds a command.
        recipe: the arguments of commands that take a recipe.
    """
    strict = argparse.ArgumentParser(add_help=False)
    strict.add_argument("--strict", action="store_true", help="treat warnings about the data as errors")
    verb("validate", run_validate, "Check a recipe, its data and its source model, without training.", recipe, strict)
    preview = verb("preview", run_preview, "Show examples as the model reads them, without training.", recipe, strict)
    preview.add_argument("--count", type=int, default=3, metavar="N", help="how many examples (default: 3)")
    add_plan(verb("plan", run_plan, "Estimate memory, time and disk of a training before it starts.", recipe))
    train = verb("train", run_train, "Train; the same command resumes an interrupted training.", recipe, strict)
    train.add_argument("--output", metavar="DIR", help="run directory or URL (default: scale.storage/name)")
    train.add_argument("--fresh", action="store_true", help=FRESH)
    search = verb("search", run_search, "Search freeze depth, learning rate and more.", recipe, strict)
    search.add_argument("--output", type=folder_or_url, metavar="DIR", help="default: storage/name-search")
    search.add_argument("--fresh", action="store_true", help=FRESH)
    search.add_argument("--estimate", action="store_true", help="estimate trials, time and disk, without searching")
    report = verb("report", run_report, "Write the report of a run or a search again: DIR/report.html.")
    report.add_argument("directory", type=Path, help="a run directory, or a search directory")


def add_plan(plan: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    where = plan.add_mutually_exclusive_group()
    where.add_argument("--on", metavar="SHAPE", help="machines such as 4x8xH100-80GB (default: this one)")
    where.add_argument("--address", metavar="URL", help="a Ray cluster's dashboard; the plan is for its nodes")
    plan.add_argument("--insecure", action="store_true", help="with --address: allow unencrypted connections")
    plan.add_argument("--from", type=Path, dest="calibration", metavar="RUN", help="take the throughput of this run")
    plan.add_argument("--examples", type=int, metavar="N", help="number of training examples, if the data are not here")


def folder_or_url(text: str) -> Path | str:
    """Return a URL as text, anything else as a path."""
    return text if is_url(text) else Path(text)


def run_validate(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from orchestrator.launch.train import check

    prepared = check(recipe, options.strict)
    show.problems(prepared.warnings, sys.stderr)
    if not options.json:
        show.validated(prepared, sys.stdout)
    return {
        "status": "valid",
        "name": recipe.name,
        "warnings": [str(warning) for warning in prepared.warnings],
        "examples": {name: len(split) for name, split in prepared.examples.items()},
    }


def run_preview(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from orchestrator.training.preview import as_record, preview

    found = preview(recipe, options.count, options.strict)
    show.problems(found.prepared.warnings, sys.stderr)
    if not options.json:
        show.previewed(found, sys.stdout)
    return as_record(found)


def run_plan(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.planning import machine_from_nodes, parse_machine
    from orchestrator.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    machine = parse_machine(options.on) if options.on else None
    if options.address:
        from orchestrator.jobs import connect

        machine = machine_from_nodes(connect(options.address, options.insecure).nodes())
    from orchestrator.planning.plan import as_record, plan

    found = plan(recipe, machine, options.examples, options.calibration)
    if not options.json:
        show.planned(found, sys.stdout)
    return as_record(found)


def run_train(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from orchestrator.launch.train import train

    run = train(recipe, options.output, options.fresh, options.strict, screen=sys.stderr)
    show.problems(run.warnings, sys.stderr)
    for note in run.notes:
        print(f"note: {note}", file=sys.stderr)
    if not options.json:
        show.trained(recipe, run, sys.stdout)
    return {"directory": run.place, "resumed": run.resumed, **run.result}


def run_search(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.estimate:
        from orchestrator.search.estimate import estimate

        expected = estimate(recipe, options.strict)
        if not options.json:
            show.estimated(recipe, expected, sys.stdout)
        return vars(expected)
    from orchestrator.search.run import search

    found = search(recipe, options.output, options.fresh, options.strict, screen=sys.stderr)
    show.problems(found.warnings, sys.stderr)
    for note in found.record.get("notes", []):
        print(f"note: {note}", file=sys.stderr)
    if not options.json:
        show.searched(recipe, found, sys.stdout)
    return {"directory": str(found.directory), "trials": found.counts, **found.record}


def run_report(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.report import write_report

    path = write_report(options.directory)
    if not options.json:
        print(f"the report is {path}")
    return {"status": "written", "report": str(path)}
