"""The command line: parse arguments, call the command, print errors."""

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
from orchestrator.cli import jobs, models, show, training
from orchestrator.errors import InputError, OrchestratorError, Problem, nearest

INTERRUPTED = 130
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=")
EXAMPLE = "a first run: orchestrator train text-classification/minilm-to-support-intent"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `InputError`s."""

    def error(self, message: str) -> NoReturn:
        raise InputError(Problem(message, remedy=f"see: {self.prog} --help"))


def build_parser() -> tuple[Parser, list[str]]:
    """Return the parser of all commands, and their names."""
    parser = Parser(prog="orchestrator", description="Fine-tune pre-trained models from recipes.", epilog=EXAMPLE)
    parser.add_argument("--version", action="version", version=f"orchestrator {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output and nothing else")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    recipe = Parser(add_help=False)
    recipe.add_argument("recipe", help="the file of a recipe, or the name of one of `orchestrator recipes`")
    text = "override a value: train.learning_rate=1e-4"
    recipe.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)

    def verb(name: str, run: Callable[[argparse.Namespace], Any], text: str, *parents: Any) -> Any:
        added = verbs.add_parser(name, help=text, description=text, parents=[common, *parents], allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    training.add_verbs(verb, recipe)
    models.add_verbs(verb)
    jobs.add_verbs(verb, recipe)
    verb("recipes", run_recipes, "List the recipes of the package.")
    schema = verb("schema", run_schema, "Print the JSON Schema of recipes, for editors.")
    for kind in ("task", "method"):
        schema.add_argument(f"--{kind}", metavar="NAME", help=f"print the schema of this {kind}'s options instead")
    verb("doctor", run_doctor, "Check this machine: packages, hardware, and how to install what is missing.")
    return parser, list(verbs.choices)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; raises InputError, with the nearest command if the first word is unknown."""
    parser, verbs = build_parser()
    first = arguments[0] if arguments else None
    if first is None or not (first.startswith("-") or first in verbs):
        close = nearest(first, verbs) if first else None
        remedy = f"did you mean {close}?" if close else f"use one of: {', '.join(verbs)}; see: orchestrator --help"
        raise InputError(Problem(f"there is no command '{first}'" if first else "no command is given", remedy=remedy))
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one group; overrides may also follow an option.
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
    """Run a command; return its exit code."""
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
        remedy = "the same command resumes from there" if given[0] in ("train", "search") else None
        return report([Problem("interrupted", remedy=remedy)], INTERRUPTED, as_json)
    except BrokenPipeError:  # The reader of the output has closed it, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # A full disk, or a folder without write permission.
        if debug:
            traceback.print_exc()
        remedy = "check the path, its permissions and the free space; --debug shows the traceback"
        return report([Problem(error.strerror or str(error), error.filename, remedy)], 1, as_json)


def run_command(given: list[str], debug: bool, as_json: bool) -> None:
    """Parse and run a command; with `as_json`, print its result as one JSON object."""
    options = parse(given)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        if not debug:  # Warnings of libraries are meant for developers.
            warnings.simplefilter("ignore")
        if as_json:  # The output of libraries is not part of the object.
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        found = options.run(options)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))


def report(problems: list[Problem], exit_code: int, as_json: bool) -> int:
    """Print what went wrong; return the exit code."""
    if as_json:
        rows = [
            {"what": item.what, "where": item.where, "remedy": item.remedy, "fatal": item.fatal} for item in problems
        ]
        status = "interrupted" if exit_code == INTERRUPTED else "error"
        print(json.dumps({"status": status, "exit_code": exit_code, "problems": rows}, ensure_ascii=False))
    show.problems(problems, sys.stderr)
    return exit_code


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
