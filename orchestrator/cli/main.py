"""The commands: parse, call, print. What they do is decided elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from orchestrator import __version__
from orchestrator.cli import show
from orchestrator.cli.jobs import add_verbs as add_job_verbs
from orchestrator.errors import InputError, OrchestratorError, Problem, nearest
from orchestrator.storage import is_url

INTERRUPTED = 130
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=")
SPLIT = "test"
HARNESS_OPTIONS = ("include", "limit", "num_fewshot", "chat_template", "batch_size")
EXAMPLE = "a first run: orchestrator train text-classification/minilm-to-support-intent"


class Parser(argparse.ArgumentParser):
    """argparse, with our words."""

    def error(self, message: str) -> NoReturn:
        raise InputError(Problem(message, remedy=f"see: {self.prog} --help"))


def build_parser() -> tuple[Parser, list[str]]:
    """The parser of all commands, and their names."""
    parser = Parser(prog="orchestrator", description="Fine-tune pre-trained models from recipes.", epilog=EXAMPLE)
    parser.add_argument("--version", action="version", version=f"orchestrator {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output and nothing else")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    strict = Parser(add_help=False)
    strict.add_argument("--strict", action="store_true", help="treat warnings about the data as errors")
    recipe, model, used = build_parents()

    def verb(name: str, run: Callable[[argparse.Namespace], Any], text: str, *parents: Parser) -> Any:
        added = verbs.add_parser(name, help=text, description=text, parents=[common, *parents], allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    verb("validate", run_validate, "Check a recipe, its data and its source model; start nothing.", recipe, strict)
    preview = verb("preview", run_preview, "Show examples as the model reads them; start nothing.", recipe, strict)
    preview.add_argument("--count", type=int, default=3, metavar="N", help="how many examples (default: 3)")
    plan = verb("plan", run_plan, "Tell memory, time and disk before anything is started.", recipe)
    where = plan.add_mutually_exclusive_group()
    where.add_argument("--on", metavar="SHAPE", help="machines such as 4x8xH100-80GB (default: this one)")
    where.add_argument("--address", metavar="URL", help="a Ray cluster's dashboard, whose nodes are asked")
    plan.add_argument("--insecure", action="store_true", help="with --address: unencrypted to another machine")
    plan.add_argument("--from", type=Path, dest="calibration", metavar="RUN", help="a run there; its pace is taken")
    plan.add_argument("--examples", type=int, metavar="N", help="of train, where the data are not at hand")
    train = verb("train", run_train, "Train; the same command goes on after an interruption.", recipe, strict)
    train.add_argument("--output", metavar="DIR", help="run directory, or its URL (default: scale.storage/name)")
    train.add_argument("--fresh", action="store_true", help="start over; the old directory is kept under another name")
    search = verb("search", run_search, "Search freeze depth, learning rate and more.", recipe, strict)
    search.add_argument("--output", type=folder_or_url, metavar="DIR", help="default: storage/name-search")
    search.add_argument("--fresh", action="store_true", help="start over; the old directory is kept under another name")
    search.add_argument("--estimate", action="store_true", help="tell trials, seconds and disk; start nothing")
    evaluate = verb("evaluate", run_evaluate, "Score a trained model on a split, a file or known benchmarks.", used)
    add_data(evaluate, None, "file, folder or Hub id (default: the data of the run's recipe)")
    evaluate.add_argument("--split", default=SPLIT, help="train, select or test (default: test)")
    add_harness(evaluate)
    predict = verb("predict", run_predict, "Predict for each row of a file or of standard input.", used)
    add_data(predict, "-", "file, picture or folder of pictures; - or nothing reads JSON lines from standard input")
    predict.add_argument("--output", type=Path, metavar="FILE", help=".jsonl or .parquet (default: JSON lines printed)")
    predict.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows per pass; results are the same")
    chat = verb("chat", run_chat, "Talk with a trained language model.", used)
    chat.add_argument("--system", metavar="TEXT", help="a system prompt (default: the recipe's)")
    export = verb("export", run_export, "Copy a trained model to a folder of its own.", model)
    export.add_argument("output", type=Path, help="the new folder")
    export.add_argument("--merge", action="store_true", help="fold an adapter into the source's weights")
    verb("report", run_report, "Write the page of a run or a search again: DIR/report.html.").add_argument(
        "directory", type=Path, help="a run directory, or a search directory"
    )
    add_job_verbs(verb, recipe)
    verb("recipes", run_recipes, "List the recipes that ship.")
    schema = verb("schema", run_schema, "Print the JSON Schema of recipes, for editors.")
    for kind in ("task", "method"):
        schema.add_argument(f"--{kind}", metavar="NAME", help=f"print the schema of this {kind}'s options instead")
    verb("doctor", run_doctor, "Tell what this machine has, and what is missing with the command that installs it.")
    return parser, list(verbs.choices)


def folder_or_url(text: str) -> Path | str:
    """Return a path; a URL as it is, which a path would not be."""
    return text if is_url(text) else Path(text)


def build_parents() -> tuple[Parser, Parser, Parser]:
    """The arguments of the commands that take a recipe, a trained model, and one that is to compute something."""
    recipe = Parser(add_help=False)
    recipe.add_argument("recipe", help="a recipe's file, or the name of one that ships (`orchestrator recipes`)")
    text = "override a value: train.learning_rate=1e-4"
    recipe.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)
    model = Parser(add_help=False)
    model.add_argument("model", type=Path, help="a run directory, or the model directory in it")
    used = Parser(add_help=False, parents=[model])
    text = "what to compute in (default: auto, on a GPU as the run did, else fp32)"
    used.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=text)
    return recipe, model, used


def add_data(verb: argparse.ArgumentParser, default: str | None, text: str) -> None:
    verb.add_argument("data", nargs="?", default=default, help=text)
    columns = "columns of the data, where they have other names: target.columns.text=sentence"
    verb.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=columns)


def add_harness(verb: argparse.ArgumentParser) -> None:
    """Options without a value are left to what they are options of."""
    group = verb.add_argument_group("benchmarks for language models, by the lm-evaluation-harness (extra `harness`)")
    group.add_argument("--harness", nargs="+", metavar="TASK", help="its tasks, groups or tags: arc_easy mmlu")
    text = "a folder with task files of your own (YAML); they may run code, so read what you did not write"
    group.add_argument("--include", type=Path, metavar="FOLDER", help=text)
    group.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")
    text = "solved examples in each prompt (default: what the task says)"
    group.add_argument("--num-fewshot", type=int, metavar="N", help=text)
    text = "put each prompt into the chat template that was saved with the model, with the recipe's system prompt"
    group.add_argument("--chat-template", action="store_const", const=True, help=text)
    group.add_argument("--batch-size", type=int, metavar="N", help="texts per pass (default: 8); results are the same")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, read; raises InputError with the nearest command when the first word is none."""
    parser, verbs = build_parser()
    first = arguments[0] if arguments else None
    if first is None or not (first.startswith("-") or first in verbs):
        close = nearest(first, verbs) if first else None
        remedy = f"did you mean {close}?" if close else f"use one of: {', '.join(verbs)}; see: orchestrator --help"
        raise InputError(Problem(f"there is no command '{first}'" if first else "no command is given", remedy=remedy))
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one stretch; overrides may also stand after an option.
    if "overrides" in options:
        options.overrides += [argument for argument in rest if not argument.startswith("-")]
        rest = [argument for argument in rest if argument.startswith("-")]
    if rest:
        remedy = f"see: orchestrator {options.verb} --help"
        raise InputError(Problem(f"{options.verb} does not know {' '.join(rest)}", remedy=remedy))
    if "data" in options and _OVERRIDE.match(options.data or "") and not Path(options.data).exists():
        options.overrides.insert(0, options.data)
        options.data = "-" if options.verb == "predict" else None
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, as_json = "--debug" in given, "--json" in given
    try:
        run_command(given, debug, as_json)
        sys.stdout.flush()
        return 0
    except OrchestratorError as error:
        if debug:
            traceback.print_exc()
        problems = list(error.problems) if isinstance(error, InputError) else [Problem(str(error))]
        return report(problems, error.exit_code, as_json)
    except KeyboardInterrupt:
        remedy = "the same command goes on from where it was" if given[0] in ("train", "search") else None
        return report([Problem("interrupted", remedy=remedy)], INTERRUPTED, as_json)
    except BrokenPipeError:  # Whoever read our output has gone, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # A full disk, a folder that may not be written: nothing that a traceback explains.
        if debug:
            traceback.print_exc()
        remedy = "check the path, its permissions and the free space; --debug shows the traceback"
        return report([Problem(error.strerror or str(error), error.filename, remedy)], 1, as_json)


def run_command(given: list[str], debug: bool, as_json: bool) -> None:
    options = parse(given)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        if not debug:  # Warnings of libraries are for those who program with them.
            warnings.simplefilter("ignore")
        if as_json:  # Whatever else is printed, by a library too, is no part of the object.
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        found = options.run(options)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))


def report(problems: list[Problem], exit_code: int, as_json: bool) -> int:
    """Tell what went wrong; returns the exit code."""
    if as_json:
        rows = [
            {"what": item.what, "where": item.where, "remedy": item.remedy, "fatal": item.fatal} for item in problems
        ]
        status = "interrupted" if exit_code == INTERRUPTED else "error"
        print(json.dumps({"status": status, "exit_code": exit_code, "problems": rows}, ensure_ascii=False))
    show.problems(problems, sys.stderr)
    return exit_code


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
    from orchestrator.planning import machine_of, read_shape
    from orchestrator.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    machine = read_shape(options.on) if options.on else None
    if options.address:
        from orchestrator.jobs import connect

        machine = machine_of(connect(options.address, options.insecure).nodes())
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
        print(f"the page is {path}")
    return {"status": "written", "report": str(path)}


def run_evaluate(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: value for name in HARNESS_OPTIONS if (value := getattr(options, name)) is not None}
    if options.harness:
        return run_harness(options, given)
    if given:
        option = next(iter(given)).replace("_", "-")
        raise InputError(Problem(f"--{option} is for benchmarks alone", remedy="name them: --harness TASK"))
    from orchestrator.inference.predict import evaluate

    given = {"overrides": options.overrides, "precision": options.precision}
    found = evaluate(options.model, options.data, options.split, **given)
    if not options.json:
        show.evaluated(found, sys.stdout)
    return found


def run_harness(options: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    if options.data is not None or options.overrides or options.split != SPLIT:
        remedy = "leave out --split, files and columns, or leave out --harness"
        raise InputError(Problem("tasks of the harness bring their own data", remedy=remedy))
    from orchestrator.inference.harness import evaluate_tasks

    found = evaluate_tasks(options.model, options.harness, precision=options.precision, **given)
    if not options.json:
        show.tasks_evaluated(found, sys.stdout)
    return found


def run_predict(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.inference.predict import predict

    output = options.output
    if output is None and options.json:
        raise InputError(Problem("--json prints one object, predictions are many", remedy="give --output FILE.jsonl"))
    if options.data == "-" and sys.stdin.isatty():
        print("reading JSON lines from the terminal; end with Ctrl-D", file=sys.stderr)
    given = {"overrides": options.overrides, "precision": options.precision}
    count = predict(options.model, options.data, output, options.batch_size, sys.stdout, **given)
    if output is not None and not options.json:
        print(f"{count:,} predictions are in {output}")
    return {"status": "predicted", "rows": count, "output": str(output)}


def run_chat(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.inference.chat import chat

    if options.json:
        raise InputError(Problem("a conversation is no JSON object", remedy="use: orchestrator predict"))
    chat(options.model, sys.stdin, sys.stdout, options.system, options.precision)
    return {"status": "ended"}


def run_export(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.inference.merge import export

    moved = export(options.model, options.output, options.merge)
    if not options.json:
        print(f"the model is in {options.output}")
        if moved is not None:
            print(f"its weights are in the source's format; rounding moved its outputs by {moved:.1e} of the largest")
    return {"status": "exported", "output": str(options.output), "merged": options.merge, "rounding": moved}


def run_recipes(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.recipe import shipped_recipes

    shipped = shipped_recipes()
    if not options.json:
        show.table([(recipe.name, recipe.summary) for recipe in shipped], sys.stdout)
    return {"recipes": [{"name": item.name, "summary": item.summary, "path": str(item.path)} for item in shipped]}


def run_schema(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.recipe.reference import json_schema, section_schema

    if options.task:
        from orchestrator.tasks import find_task

        found = section_schema(find_task(options.task).Options, f"Options of {options.task}")
    elif options.method:
        from orchestrator.transfer import find_method

        found = section_schema(find_method(options.method).Options, f"Options of {options.method}")
    else:
        found = json_schema()
    if not options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    return found


def run_doctor(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.cli.doctor import examine

    findings = examine()
    if not options.json:
        show.findings(findings, sys.stdout)
    missing = [finding.name for finding in findings if finding.remedy]
    return {"findings": [vars(finding) for finding in findings], "missing": missing}
