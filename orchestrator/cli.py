"""The commands: parse, call, print. What they do is decided elsewhere."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from orchestrator import __version__, show
from orchestrator.errors import InputError, OrchestratorError, Problem, nearest

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse, with our words and the nearest name for a mistyped command."""

    def error(self, message: str) -> NoReturn:
        raise InputError(Problem(message, remedy=f"see: {self.prog} --help"))


def build_parser() -> Parser:
    parser = Parser(prog="orchestrator", description="Fine-tune pre-trained models from recipes.")
    parser.add_argument("--version", action="version", version=f"orchestrator {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output and nothing else")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    strict = argparse.ArgumentParser(add_help=False)
    strict.add_argument("--strict", action="store_true", help="treat warnings about the data as errors")

    def verb(name: str, run: Callable[[argparse.Namespace], Any], text: str, *parents: argparse.ArgumentParser) -> Any:
        added = verbs.add_parser(name, help=text, description=text, parents=[common, *parents])
        added.set_defaults(run=run)
        return added

    recipe = argparse.ArgumentParser(add_help=False)
    recipe.add_argument("recipe", help="a recipe's file, or the name of one that ships (`orchestrator recipes`)")
    recipe.add_argument("overrides", nargs="*", metavar="key=value", help="override a value: train.learning_rate=1e-4")
    verb("validate", run_validate, "Check a recipe, its data and its source model; start nothing.", recipe, strict)
    train = verb("train", run_train, "Train; the same command goes on after an interruption.", recipe, strict)
    train.add_argument("--output", type=Path, help="run directory (default: scale.storage/name)")
    train.add_argument("--fresh", action="store_true", help="start over; the old directory is kept under another name")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("model", type=Path, help="a run directory, or the model directory in it")
    evaluate = verb("evaluate", run_evaluate, "Score a trained model on a split or a file.", model)
    evaluate.add_argument("data", nargs="?", help="file, folder or Hub id (default: the data of the run's recipe)")
    evaluate.add_argument("--split", default="test", help="train, select or test (default: test)")
    predict = verb("predict", run_predict, "Predict for each row of a file or of standard input.", model)
    predict.add_argument("data", nargs="?", default="-", help="file; - or nothing reads JSON lines from standard input")
    predict.add_argument("--output", type=Path, help="a .jsonl or .parquet file (default: JSON lines on standard output)")
    predict.add_argument("--batch-size", type=int, default=32, help="texts per forward pass; predictions do not depend on it")
    export = verb("export", run_export, "Copy a trained model to a folder of its own.", model)
    export.add_argument("output", type=Path, help="the new folder")
    export.add_argument("--merge", action="store_true", help="fold an adapter into the source's weights")
    verb("recipes", run_recipes, "List the recipes that ship.")
    schema = verb("schema", run_schema, "Print the JSON Schema of recipes, for editors.")
    schema.add_argument("--task", help="print the schema of this task's options instead")
    verb("doctor", run_doctor, "Tell what this machine has, and what is missing with the command that installs it.")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, as_json = "--debug" in given, "--json" in given
    try:
        options = build_parser().parse_args(correct_verb(given))
        found = options.run(options)
        if as_json:
            print(json.dumps(found, ensure_ascii=False))
        return 0
    except OrchestratorError as error:
        if debug:
            traceback.print_exc()
        report_error(error, as_json)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # Whoever read our output has gone, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def correct_verb(arguments: list[str]) -> list[str]:
    """The arguments as they are; raises InputError with the nearest command when the first word is none."""
    verbs = ["validate", "train", "evaluate", "predict", "export", "recipes", "schema", "doctor"]
    if not arguments or arguments[0].startswith("-") or arguments[0] in verbs:
        return arguments
    close = nearest(arguments[0], verbs)
    remedy = f"did you mean {close}?" if close else f"use one of: {', '.join(verbs)}"
    raise InputError(Problem(f"there is no command '{arguments[0]}'", remedy=remedy))


def report_error(error: OrchestratorError, as_json: bool) -> None:
    problems = list(error.problems) if isinstance(error, InputError) else [Problem(str(error))]
    if as_json:
        rows = [{"what": item.what, "where": item.where, "remedy": item.remedy, "fatal": item.fatal} for item in problems]
        print(json.dumps({"status": "error", "exit_code": error.exit_code, "problems": rows}, ensure_ascii=False))
    show.problems(problems, sys.stderr)


def run_validate(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from orchestrator.training.run import check

    prepared = check(recipe, options.strict)
    show.problems(prepared.warnings, sys.stderr)
    found = {"status": "valid", "name": recipe.name, "warnings": [str(warning) for warning in prepared.warnings]}
    found["examples"] = {name: len(split) for name, split in prepared.examples.items()}
    if not options.json:
        show.validated(prepared, sys.stdout)
    return found


def run_train(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from orchestrator.training.run import train

    run = train(recipe, options.output, options.fresh, options.strict, screen=sys.stderr)
    show.problems(run.warnings, sys.stderr)
    for note in run.notes:
        print(f"note: {note}", file=sys.stderr)
    if not options.json:
        show.trained(recipe, run, sys.stdout)
    return {"directory": str(run.directory), "resumed": run.resumed, **run.result}


def run_evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.training.inference import evaluate

    found = evaluate(options.model, options.data, options.split)
    if not options.json:
        show.evaluated(found, sys.stdout)
    return found


def run_predict(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.training.inference import predict

    output = options.output
    if output is None and options.json:
        raise InputError(Problem("--json prints one object, predictions are many", remedy="give --output FILE.jsonl"))
    count = predict(options.model, options.data, output, options.batch_size, sys.stdout)
    return {"status": "predicted", "rows": count, "output": str(output)}


def run_export(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.training.inference import export

    export(options.model, options.output, options.merge)
    if not options.json:
        print(f"the model is in {options.output}")
    return {"status": "exported", "output": str(options.output), "merged": options.merge}


def run_recipes(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.recipe import shipped_recipes

    shipped = shipped_recipes()
    if not options.json:
        show.table([(recipe.name, recipe.summary) for recipe in shipped], sys.stdout)
    return {"recipes": [{"name": item.name, "summary": item.summary, "path": str(item.path)} for item in shipped]}


def run_schema(options: argparse.Namespace) -> dict[str, Any]:
    if options.task:
        from orchestrator.tasks import find_task

        found = find_task(options.task).Options.model_json_schema()
    else:
        from orchestrator.recipe.reference import json_schema

        found = json_schema()
    if not options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    return found


def run_doctor(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.doctor import examine

    findings = examine()
    if not options.json:
        show.findings(findings, sys.stdout)
    missing = [finding.name for finding in findings if finding.remedy]
    return {"findings": [vars(finding) for finding in findings], "missing": missing}


if __name__ == "__main__":
    sys.exit(main())
