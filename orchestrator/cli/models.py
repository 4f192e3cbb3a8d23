"""The commands that take a trained model: parse arguments, call the package, print the result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.cli import show
from orchestrator.errors import InputError, Problem
from orchestrator.formatting import format_count

SPLIT = "test"
HARNESS_OPTIONS = ("include", "limit", "num_fewshot", "chat_template", "batch_size")


def add_verbs(verb: Callable[..., Any]) -> None:
    """Add the commands to a parser; `verb` adds a command."""
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("model", type=Path, help="a run directory, or the model directory in it")
    used = argparse.ArgumentParser(add_help=False, parents=[model])
    text = "precision to compute in (default: auto, that of the run on a GPU, fp32 on a CPU)"
    used.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=text)
    evaluate = verb("evaluate", run_evaluate, "Evaluate a trained model on a split, a file or public benchmarks.", used)
    add_data(evaluate, None, "file, folder or Hub id (default: the data of the run's recipe)")
    evaluate.add_argument("--split", default=SPLIT, help="train, select or test (default: test)")
    add_harness(evaluate)
    predict = verb("predict", run_predict, "Predict for each row of a file or of standard input.", used)
    add_data(predict, "-", "file, picture or folder of pictures; - or nothing reads JSON lines from standard input")
    predict.add_argument("--output", type=Path, metavar="FILE", help=".jsonl or .parquet (default: JSON lines printed)")
    predict.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows per pass; no effect on results")
    chat = verb("chat", run_chat, "Chat with a trained language model.", used)
    chat.add_argument("--system", metavar="TEXT", help="a system prompt (default: the recipe's)")
    export = verb("export", run_export, "Copy a trained model to a new folder.", model)
    export.add_argument("output", type=Path, help="the new folder")
    export.add_argument("--merge", action="store_true", help="merge an adapter into the source's weights")


def add_data(verb: argparse.ArgumentParser, default: str | None, text: str) -> None:
    verb.add_argument("data", nargs="?", default=default, help=text)
    columns = "names of the data's columns, if they differ from the recipe's: target.columns.text=sentence"
    verb.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=columns)


def add_harness(verb: argparse.ArgumentParser) -> None:
    """Add the options of benchmarks; those that are not given have the defaults of `evaluate_tasks`."""
    group = verb.add_argument_group("benchmarks for language models, by the lm-evaluation-harness (extra `harness`)")
    group.add_argument("--harness", nargs="+", metavar="TASK", help="its tasks, groups or tags: arc_easy mmlu")
    text = "a folder with your own task files (YAML); they may run code, so check files from others first"
    group.add_argument("--include", type=Path, metavar="FOLDER", help=text)
    group.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task")
    text = "solved examples in each prompt (default: the task's own number)"
    group.add_argument("--num-fewshot", type=int, metavar="N", help=text)
    text = "apply the model's chat template to each prompt, with the recipe's system prompt"
    group.add_argument("--chat-template", action="store_const", const=True, help=text)
    group.add_argument("--batch-size", type=int, metavar="N", help="texts per pass (default: 8); no effect on results")


def run_evaluate(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: value for name in HARNESS_OPTIONS if (value := getattr(options, name)) is not None}
    if options.harness:
        return run_harness(options, given)
    if given:
        option = next(iter(given)).replace("_", "-")
        raise InputError(Problem(f"--{option} is for benchmarks only", remedy="name them: --harness TASK"))
    from orchestrator.inference.predict import evaluate

    given = {"overrides": options.overrides, "precision": options.precision}
    found = evaluate(options.model, options.data, options.split, **given)
    if not options.json:
        show.evaluated(found, sys.stdout)
    return found


def run_harness(options: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    if options.data is not None or options.overrides or options.split != SPLIT:
        remedy = "leave out --split, files and columns, or leave out --harness"
        raise InputError(Problem("tasks of the harness have their own data", remedy=remedy))
    from orchestrator.inference.harness import evaluate_tasks

    found = evaluate_tasks(options.model, options.harness, precision=options.precision, **given)
    if not options.json:
        show.tasks_evaluated(found, sys.stdout)
    return found


def run_predict(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.inference.predict import predict

    output = options.output
    if output is None and options.json:
        raise InputError(Problem("--json prints a single object, not predictions", remedy="give --output FILE.jsonl"))
    if options.data == "-" and sys.stdin.isatty():
        print("reading JSON lines from the terminal; end with Ctrl-D", file=sys.stderr)
    given = {"overrides": options.overrides, "precision": options.precision}
    count = predict(options.model, options.data, output, options.batch_size, sys.stdout, **given)
    if output is not None and not options.json:
        print(f"{format_count(count, 'prediction')} written to {output}")
    return {"status": "predicted", "rows": count, "output": str(output)}


def run_chat(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.inference.chat import chat

    if options.json:
        raise InputError(Problem("chat does not support --json", remedy="use: orchestrator predict"))
    chat(options.model, sys.stdin, sys.stdout, options.system, options.precision)
    return {"status": "ended"}


def run_export(options: argparse.Namespace) -> dict[str, Any]:
    from orchestrator.inference.merge import export

    moved = export(options.model, options.output, options.merge)
    if not options.json:
        print(f"the model is in {options.output}")
        if moved is not None:
            print(
                f"its weights are in the source's format; rounding changed outputs by up to {moved:.1e} of the largest"
            )
    return {"status": "exported", "output": str(options.output), "merged": options.merge, "rounding": moved}
