"""Score a trained language model on tasks of EleutherAI's lm-evaluation-harness (the extra `harness`)."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.data.formats.hub import offline_unless_reachable
from orchestrator.data.messages import show_name
from orchestrator.errors import DataError, InputError, Problem, nearest
from orchestrator.inference.trained_model import Trained, Wanted, load_trained
from orchestrator.tasks.bases.chat import Template
from orchestrator.tasks.bases.generation import ANSWER
from orchestrator.tasks.bases.text import longest_conversation

OPTION = "--harness"
NUM_DRAWS = 1000  # Of a standard error, two digits are enough.


def evaluate_tasks(
    folder: Path,
    names: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    batch_size: int = 8,
    precision: Wanted = "auto",
) -> dict[str, Any]:
    """Score a trained language model on tasks of the harness; the answer has the shape of that of `evaluate`.

    `metrics` has an entry for each task, and for each group that the harness sums up, under the harness's names. Scores
    are those of the harness, but for whole texts, and for choices under a chat template, where it would have the model
    read something else than in training (`as_harness_model`).

    Args:
        names: tasks, groups of tasks or tags.
        include: a folder with task files of the user's own; they may run code.
        limit: only so many of the first examples of each task.
        num_fewshot: solved examples in each prompt; None for what each task says.
        chat_template: put prompts into the model's chat template, under the recipe's system prompt.
        batch_size: texts per pass.

    Raises:
        InputError: the extra is not installed; no such model, folder or task; the model is no language model; a task
            cannot be run here.
        DataError: the data of a task cannot be reached or read.
    """
    if find_spec("lm_eval") is None:
        remedy = "pip install 'transfer-orchestrator[harness]'"
        raise InputError(Problem("the package lm_eval is not installed", OPTION, remedy))
    check_request(include, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    check_names(names, manager.all_tasks)
    trained = load_trained(folder, precision)
    if not trained.task.is_language_model:
        what = f"a model for {trained.task.name} is no language model"
        raise InputError(Problem(what, str(folder), f"score it on its own data, without {OPTION}"))
    with no_metrics_from_elsewhere() as refused, contextlib.redirect_stdout(sys.stderr):
        tasks = [task for name in dict.fromkeys(names) for task in load_task(manager, name)]
        try:
            manager.load(tasks)
        except ValueError as error:  # The harness's word for a task that several names stand for.
            raise InputError(Problem(str(error), OPTION, "name it once")) from error
        if refused:
            raise InputError(refused)
        found = lm_eval.simple_evaluate(
            model=as_harness_model(trained, chat_template, batch_size),
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=NUM_DRAWS,
            apply_chat_template=chat_template,
            system_instruction=trained.task.options.system if chat_template else None,
            log_samples=False,
        )
    return as_record(found, trained, names, {"limit": limit, "chat_template": chat_template})


def check_request(include: Path | None, **numbers: int | None) -> None:
    """Raise InputError for a folder that is not there and for numbers that are too small."""
    problems = []
    if include is not None and not include.is_dir():
        problems.append(Problem("there is no such folder", str(include), "name the folder of your task files"))
    for name, number in numbers.items():
        least = 0 if name == "num_fewshot" else 1
        if number is not None and number < least:
            option = f"--{name.replace('_', '-')}"
            problems.append(Problem(f"{number} is too few", option, f"give {least} or more"))
    if problems:
        raise InputError(problems)


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError for tasks that are not there, each with the nearest name."""
    problems = []
    for name in names:
        if name not in known:
            close = nearest(name, known)
            remedy = f"did you mean {close}?" if close else "see: lm-eval ls tasks; for your own give --include FOLDER"
            problems.append(Problem(f"the harness has no task {show_name(name)}", OPTION, remedy))
    if problems:
        raise InputError(problems)


@contextlib.contextmanager
def no_metrics_from_elsewhere() -> Iterator[list[Problem]]:
    """Refuse metrics that are code: from the Hub, or from a folder here that happens to have the name of one.

    The problems are collected too, because the harness takes a metric that cannot be had for one that is not needed.
    """
    import evaluate

    refused: list[Problem] = []
    load = evaluate.load

    def refuse(metric: str, *_: Any, **__: Any) -> NoReturn:
        remedy = "leave the task out, or export the model and run the harness yourself"
        what = f"the metric {show_name(metric)} is not the harness's own but code from elsewhere, which is not run"
        refused.append(Problem(what, OPTION, remedy))
        raise InputError(refused)

    evaluate.load = refuse
    try:
        yield refused
    finally:
        evaluate.load = load


def load_task(manager: Any, name: str) -> list[Any]:
    """A task or a group, or the tasks with a tag, with their data.

    Raises:
        InputError: a task that is not run here, or needs a package.
        DataError: the data cannot be reached or read.
    """
    import datasets
    from jinja2 import TemplateError

    wrong = (datasets.exceptions.DatasetsError, TemplateError, OSError, ValueError, TypeError, KeyError)
    with offline_unless_reachable():
        try:
            loaded = manager.load([name])
        except ImportError as error:
            remedy = "install it, or leave the task out"
            raise InputError(Problem(f"{name} needs a package: {error}", OPTION, remedy)) from error
        except wrong as error:
            raise DataError(explain(error, name)) from error
    for part, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            remedy = "leave it out, or export the model and run the harness where such code can do no harm"
            raise InputError(Problem(f"{part} runs code that the model writes", OPTION, remedy))
        if getattr(task, "MULTIMODAL", False):
            raise InputError(Problem(f"{part} asks about more than texts", OPTION, "leave it out"))
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def explain(error: Exception, name: str) -> Problem:
    detail = show_name((str(error) or type(error).__name__).splitlines()[0])
    if isinstance(error, ConnectionError):
        what = f"the data of {name} are not on this machine, and the Hugging Face Hub cannot be reached"
        return Problem(what, OPTION, "connect to the network; tasks of your own may read files (--include FOLDER)")
    return Problem(f"{name} cannot be loaded: {detail}", OPTION, "check the task's file and the data that it names")


def as_harness_model(trained: Trained, chat_template: bool, batch_size: int) -> Any:
    """The model as the harness takes it, reading texts and conversations as in training."""
    from lm_eval.models.huggingface import HFLM

    begins: bool | None = False if chat_template else None  # A template has its own; None leaves it to the tokenizer.
    gap = space_before_answers(trained.processor) if chat_template else ""

    class HarnessModel(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
            for request in requests:
                prompt, answer = request.arguments
                if not prompt[-1:].isspace() and not answer[:1].isspace():
                    request.arguments = (prompt, gap + answer)
            return super().loglikelihood(requests, disable_tqdm)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
            # The harness begins each text with a token itself: one more would count as a part of the text.
            self.add_bos_token: bool | None = False
            found = super().loglikelihood_rolling(requests, disable_tqdm)
            self.add_bos_token = begins
            return found

    # The harness ties what belongs together once more, which fails where an adapter has trained one of the two whole.
    trained.model.tie_weights = lambda: None
    logger = logging.getLogger(HFLM.__module__)
    logger.disabled = True  # It warns of a model that is loaded already.
    model = HarnessModel(
        pretrained=trained.model,
        tokenizer=trained.processor,
        max_length=longest_conversation(trained.processor, trained.model),
        batch_size=batch_size,
        add_bos_token=begins,
    )
    logger.disabled = False
    return model


def space_before_answers(tokenizer: Any) -> str:
    """Space that the chat template writes between a prompt and its answer; the harness leaves it out before choices."""
    template = Template.of(tokenizer, tokenizer.chat_template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    prompt = template.render(turns[:1], add_generation_prompt=True)[0]
    gap = template.render(turns)[0].partition(ANSWER)[0].removeprefix(prompt)
    return gap if gap.isspace() else ""


def as_record(found: dict[str, Any], trained: Trained, names: Sequence[str], how: dict[str, Any]) -> dict[str, Any]:
    """What the harness has found, in the shape of what `evaluate` returns."""
    tasks = {
        name: {
            "examples": counts["effective"],
            "version": found["versions"][name],
            "num_fewshot": found["n-shot"][name],
        }
        for name, counts in found["n-samples"].items()
    }
    metrics = {
        # A metric is followed by the filter that answers went through; other entries are no scores.
        name: {
            metric.removesuffix(",none"): float(value)
            for metric, value in values.items()
            if "," in metric and isinstance(value, Real)
        }
        for name, values in found["results"].items()
    }
    return {
        "model": str(trained.folder),
        "data": ", ".join(names),
        "examples": sum(task["examples"] for task in tasks.values()),
        "metrics": metrics,
        "details": {"lm_eval": found["lm_eval_version"], **how, "tasks": tasks},
    }
