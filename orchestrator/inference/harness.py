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
from orchestrator.inference.trained_model import PrecisionChoice, TrainedModel, load_trained_model
from orchestrator.tasks.bases.chat import Template
from orchestrator.tasks.bases.generation import ANSWER
from orchestrator.tasks.bases.text import longest_conversation

OPTION = "--harness"
NUM_BOOTSTRAPS = 1000  # Enough for two digits of a standard error.


def evaluate_tasks(
    folder: Path,
    names: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    batch_size: int = 8,
    precision: PrecisionChoice = "auto",
) -> dict[str, Any]:
    """Score a trained language model on tasks of the harness; the result is shaped like that of `evaluate`.

    `metrics` has an entry for each task, and for each group that the harness aggregates, under the harness's names. The
    scores are the harness's own, except for whole texts, and for choices under a chat template, where the harness would
    give the model other inputs than training does (`as_harness_model`).

    Args:
        names: tasks, groups of tasks or tags.
        include: a folder with the user's own task files; they may run code.
        limit: number of examples of each task, from its beginning; None for all.
        num_fewshot: solved examples in each prompt; None for the task's own number.
        chat_template: apply the model's chat template to prompts, with the recipe's system prompt.
        batch_size: texts per pass.

    Raises:
        InputError: the extra is not installed; the model, folder or task does not exist; the model is not a language
            model; a task cannot run here.
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
    trained = load_trained_model(folder, precision)
    if not trained.task.is_language_model:
        what = f"a model for {trained.task.name} is not a language model"
        raise InputError(Problem(what, str(folder), f"score it on its own data, without {OPTION}"))
    with refusing_external_metrics() as refused, contextlib.redirect_stdout(sys.stderr):
        tasks = [task for name in dict.fromkeys(names) for task in load_task(manager, name)]
        try:
            manager.load(tasks)
        except ValueError as error:  # Raised for a task that is named twice.
            raise InputError(Problem(str(error), OPTION, "name it once")) from error
        if refused:
            raise InputError(refused)
        found = lm_eval.simple_evaluate(
            model=as_harness_model(trained, chat_template, batch_size),
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=NUM_BOOTSTRAPS,
            apply_chat_template=chat_template,
            system_instruction=trained.task.options.system if chat_template else None,
            log_samples=False,
        )
    return as_record(found, trained, names, {"limit": limit, "chat_template": chat_template})


def check_request(include: Path | None, **numbers: int | None) -> None:
    """Raise InputError for a folder that does not exist and for numbers that are too small."""
    problems = []
    if include is not None and not include.is_dir():
        problems.append(Problem("the folder does not exist", str(include), "name the folder of your task files"))
    for name, number in numbers.items():
        least = 0 if name == "num_fewshot" else 1
        if number is not None and number < least:
            option = f"--{name.replace('_', '-')}"
            problems.append(Problem(f"{number} is too few", option, f"give {least} or more"))
    if problems:
        raise InputError(problems)


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError for unknown tasks, each with the nearest name."""
    problems = []
    for name in names:
        if name not in known:
            close = nearest(name, known)
            remedy = (
                f"did you mean {close}?" if close else "see: lm-eval ls tasks; for your own tasks give --include FOLDER"
            )
            problems.append(Problem(f"the harness has no task {show_name(name)}", OPTION, remedy))
    if problems:
        raise InputError(problems)


@contextlib.contextmanager
def refusing_external_metrics() -> Iterator[list[Problem]]:
    """Refuse metrics that are code from the Hub, or from a local folder of that name; yield a list of the refusals.

    The refusals are collected, because the harness continues without metrics that it cannot load.
    """
    import evaluate

    refused: list[Problem] = []
    load = evaluate.load

    def refuse(metric: str, *_: Any, **__: Any) -> NoReturn:
        remedy = "leave the task out, or export the model and run the harness yourself"
        what = f"the metric {show_name(metric)} is not the harness's own but external code, which is not run"
        refused.append(Problem(what, OPTION, remedy))
        raise InputError(refused)

    evaluate.load = refuse
    try:
        yield refused
    finally:
        evaluate.load = load


def load_task(manager: Any, name: str) -> list[Any]:
    """Load a task, a group, or the tasks with a tag, with their data.

    Raises:
        InputError: a task cannot run here, or needs a package.
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
            remedy = "leave it out, or export the model and run the harness in a sandbox"
            raise InputError(Problem(f"{part} runs code that the model writes", OPTION, remedy))
        if getattr(task, "MULTIMODAL", False):
            raise InputError(Problem(f"{part} has other inputs than texts", OPTION, "leave it out"))
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def explain(error: Exception, name: str) -> Problem:
    """Return the problem of a task that cannot be loaded."""
    detail = show_name((str(error) or type(error).__name__).splitlines()[0])
    if isinstance(error, ConnectionError):
        what = f"the data of {name} are not on this machine, and the Hugging Face Hub cannot be reached"
        return Problem(what, OPTION, "connect to the network; your own tasks may read local files (--include FOLDER)")
    return Problem(f"{name} cannot be loaded: {detail}", OPTION, "check the task's file and the data that it names")


def as_harness_model(trained: TrainedModel, chat_template: bool, batch_size: int) -> Any:
    """Wrap the model for the harness, with the inputs that texts and conversations have in training."""
    from lm_eval.models.huggingface import HFLM

    # A template has its own token at the beginning; None leaves it to the tokenizer.
    adds_bos: bool | None = False if chat_template else None
    gap = space_before_answers(trained.processor) if chat_template else ""

    class HarnessModel(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
            for request in requests:
                prompt, answer = request.arguments
                if not prompt[-1:].isspace() and not answer[:1].isspace():
                    request.arguments = (prompt, gap + answer)
            return super().loglikelihood(requests, disable_tqdm)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
            # The harness itself adds the first token: another one would count as a part of the text.
            self.add_bos_token: bool | None = False
            found = super().loglikelihood_rolling(requests, disable_tqdm)
            self.add_bos_token = adds_bos
            return found

    # The harness ties weights again, which fails if an adapter holds a trained copy of one of them.
    trained.model.tie_weights = lambda: None
    logger = logging.getLogger(HFLM.__module__)
    logger.disabled = True  # It warns about models that are loaded already.
    model = HarnessModel(
        pretrained=trained.model,
        tokenizer=trained.processor,
        max_length=longest_conversation(trained.processor, trained.model),
        batch_size=batch_size,
        add_bos_token=adds_bos,
    )
    logger.disabled = False
    return model


def space_before_answers(tokenizer: Any) -> str:
    """Return the space between a prompt and its answer in the chat template; the harness omits it before choices."""
    template = Template.of(tokenizer, tokenizer.chat_template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    prompt = template.render(turns[:1], add_generation_prompt=True)[0]
    gap = template.render(turns)[0].partition(ANSWER)[0].removeprefix(prompt)
    return gap if gap.isspace() else ""


def as_record(
    found: dict[str, Any], trained: TrainedModel, names: Sequence[str], how: dict[str, Any]
) -> dict[str, Any]:
    """Return the harness's results, shaped like those of `evaluate`."""
    tasks = {
        name: {
            "examples": counts["effective"],
            "version": found["versions"][name],
            "num_fewshot": found["n-shot"][name],
        }
        for name, counts in found["n-samples"].items()
    }
    metrics = {
        # The name of a metric is followed by the filter of its answers; other entries are not scores.
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
