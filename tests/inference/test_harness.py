"""Tasks of the lm-evaluation-harness: what it is given, what comes back, what is refused.

The package is too heavy for the test environment, so a stand-in with its interface (0.4.13) takes its place here; the
tests at the end use the package itself where it is installed.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import orchestrator
from orchestrator.cli.main import main
from orchestrator.errors import InputError
from orchestrator.inference import harness
from orchestrator.inference.harness import evaluate_tasks
from orchestrator.inference.trained_model import load_trained_model
from orchestrator.tasks.bases.chat import SHIPPED

Capture = pytest.CaptureFixture[str]
WriteToy = Callable[..., Path]
HAS_HARNESS = find_spec("lm_eval") is not None
RESULTS = {
    "results": {
        "toy": {
            "name": "toy",
            "alias": "a toy",
            "sample_len": 5,
            "acc,none": np.float32(0.25),
            "acc_stderr,none": 0.125,
            "exact_match,strict-match": 0.5,
            "exact_match_stderr,strict-match": "N/A",
        },
        "toys": {"name": "toys", "alias": "toys", "sample_len": 5, "acc,none": 0.25, "acc_stderr,none": 0.125},
    },
    "versions": {"toy": 2.0, "toys": None},
    "n-shot": {"toy": 3},
    "n-samples": {"toy": {"original": 9, "effective": 5}},
    "lm_eval_version": "0.4.13",
}


class Model:
    """As `HFLM`: a model that is given is tied, texts are encoded as `add_bos_token` says."""

    def __init__(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        pretrained.tie_weights()
        self.model, self.tokenizer, self.options = pretrained, tokenizer, options
        self.add_bos_token = options["add_bos_token"]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return [request.arguments for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return [self.add_bos_token for _ in requests]


@dataclass(frozen=True)
class Part:
    """A task, or a group of some."""

    name: str
    tasks: tuple[str, ...]
    UNSAFE_CODE: bool = False
    MULTIMODAL: bool = False


ERRORS = {
    "unreachable": ConnectionError("Couldn't reach 'owner/data' on the Hub"),
    "broken": FileNotFoundError("Unable to find 'nowhere.jsonl'\nat all"),
    "lacking": ModuleNotFoundError("No module named 'antlr4'"),
}


class Manager:
    """As `TaskManager`: tasks and groups by name, with what goes wrong with some of them."""

    all_tasks = ("toy", "toys", "unsafe", "pictures", "foreign", "swallowed", *ERRORS)

    def __init__(self, include_path: Path | None = None) -> None:
        self.include_path = include_path

    def load(self, wanted: list[str | Part]) -> dict[str, dict[str, Part]]:
        parts = [self.make(part) if isinstance(part, str) else part for part in wanted]
        tasks: dict[str, Part] = {}
        for part in parts:
            for name in part.tasks:
                if name in tasks:
                    raise ValueError(f"Duplicate task '{name}': found in both '{tasks[name].name}' and '{part.name}'")
                tasks[name] = part
        return {"tasks": tasks, "groups": {part.name: part for part in parts if part.name not in part.tasks}}

    def make(self, name: str) -> Part:
        if name in ERRORS:
            raise ERRORS[name]
        if name in ("foreign", "swallowed"):
            with contextlib.suppress(*([Exception] if name == "swallowed" else [])):
                sys.modules["evaluate"].load("squad")
        return Part(name, ("toy",) if name == "toys" else (name,), name == "unsafe", name == "pictures")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The stand-in, in place; what it was called with."""
    found: list[dict[str, Any]] = []

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        print("bootstrapping for stddev: perplexity")
        found.append(given)
        return RESULTS

    parts: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": Manager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": Model},
        "evaluate": {"load": lambda name: f"the code of {name}"},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return found


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, write_toy: WriteToy, small_data: Path, tiny_gpt2: Path, tiny_bert: Path
) -> Path:
    """A folder with runs: a language model tuned whole and by an adapter on texts, one on chats, and a classifier."""
    root = tmp_path_factory.mktemp("harness")
    texts, chats = root / "texts.jsonl", root / "chats.jsonl"
    sentences = [f"the {animal} says {number} times hi" for animal in ("cat", "dog", "cow") for number in range(12)]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences), encoding="utf-8")
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "me"}] for n in range(24)]
    chats.write_text("".join(json.dumps({"messages": two}) + "\n" for two in turns), encoding="utf-8")
    language = {"task": "causal-lm", "options": {"max_length": 64}}
    lora = {"adapter": {"type": "lora", "r": 4, "modules_to_save": ["wte"]}}
    recipes: dict[str, dict[str, Any]] = {
        "whole": {"target": {**language, "data": str(texts)}},
        "adapter": {"target": {**language, "data": str(texts)}, "transfer": lora},
        "chat": {"target": {**language, "data": str(chats), "options": {"max_length": 64, "system": "Be short."}}},
        "classifier": {},
    }
    for name, sections in recipes.items():
        source = tiny_bert if name == "classifier" else tiny_gpt2
        recipe = write_toy(
            root / f"{name}.yaml", source, small_data, train={"epochs": 2, "learning_rate": 0.01}, **sections
        )
        orchestrator.train(orchestrator.load_recipe(recipe), root / name)
    return root


def logits_of(model: Any, text: str, tokenizer: Any) -> torch.Tensor:
    given = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    return found


def test_scores_come_back_for_each_task_in_the_shape_of_evaluate(runs: Path, calls: list[dict[str, Any]]) -> None:
    found = evaluate_tasks(runs / "whole", ["toys"], limit=5)
    assert found == {
        "model": str(runs / "whole" / "model"),
        "data": "toys",
        "examples": 5,
        "metrics": {
            "toy": {"acc": 0.25, "acc_stderr": 0.125, "exact_match,strict-match": 0.5},
            "toys": {"acc": 0.25, "acc_stderr": 0.125},
        },
        "details": {
            "lm_eval": "0.4.13",
            "limit": 5,
            "chat_template": False,
            "tasks": {"toy": {"examples": 5, "version": 2.0, "num_fewshot": 3}},
        },
    }
    assert json.loads(json.dumps(found)) == found


def test_the_harness_is_told_what_was_asked_for_and_never_to_run_code(runs: Path, calls: list[dict[str, Any]]) -> None:
    evaluate_tasks(runs / "chat", ["toy"], include=runs, limit=2, num_fewshot=1, chat_template=True, batch_size=3)
    (given,) = calls
    assert (given["limit"], given["num_fewshot"], given["apply_chat_template"]) == (2, 1, True)
    assert given["system_instruction"] == "Be short."
    assert given["task_manager"].include_path == runs
    assert given["model"].options == {"max_length": 64, "batch_size": 3, "add_bos_token": False}
    assert not {"confirm_run_unsafe_code", "trust_remote_code"} & given.keys()
    evaluate_tasks(runs / "chat", ["toy"])
    assert calls[1]["system_instruction"] is None
    assert calls[1]["model"].options["add_bos_token"] is None


@pytest.mark.parametrize("run", ["whole", "adapter"])
def test_the_model_computes_what_others_compute_with_it(run: str, runs: Path, calls: list[dict[str, Any]]) -> None:
    from peft import AutoPeftModelForCausalLM

    evaluate_tasks(runs / run, ["toy"])
    given = calls[0]["model"]
    folder = runs / run / "model"
    loader = AutoPeftModelForCausalLM if run == "adapter" else AutoModelForCausalLM
    plain, tokenizer = loader.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = "the cow says"
    expected = logits_of(plain, text, tokenizer)
    torch.testing.assert_close(logits_of(given.model, text, given.tokenizer), expected, atol=1e-5, rtol=1e-4)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    written = [model.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for model in (given.model, plain)]
    assert torch.equal(*written)


def test_a_whole_text_begins_with_one_token_of_the_harness(runs: Path, calls: list[dict[str, Any]]) -> None:
    evaluate_tasks(runs / "whole", ["toy"])
    model = calls[0]["model"]
    assert model.loglikelihood_rolling([SimpleNamespace(arguments=("a text",))]) == [False]
    assert model.add_bos_token is None


@pytest.mark.parametrize(("template", "answer"), [("plain", " me"), ("chatml", "me")])
def test_a_choice_stands_where_the_template_has_the_answer(
    template: str, answer: str, runs: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load_trained_model(runs / "chat")
    trained.processor.chat_template = SHIPPED[template]
    monkeypatch.setattr(harness, "load_trained_model", lambda *_: trained)
    evaluate_tasks(runs / "chat", ["toy"], chat_template=True)
    asked = [("User: who?\nAssistant:", "me"), ("I think", " me"), ("I think ", "me")]
    found = calls[0]["model"].loglikelihood([SimpleNamespace(arguments=pair) for pair in asked])
    assert found == [(asked[0][0], answer), *asked[1:]]


Given = dict[str, Any]
WRONG: dict[str, tuple[str, list[str], Given, str]] = {
    "an unknown task": ("whole", ["toy", "broke"], {}, "no task broke\n    -> did you mean broken?"),
    "a task like no other": ("whole", ["zzz"], {}, "no task zzz"),
    "no example": ("whole", ["toy"], {"limit": 0}, "--limit: 0 is too few"),
    "fewer than no example": ("whole", ["toy"], {"num_fewshot": -1}, "--num-fewshot: -1 is too few"),
    "a folder that is not there": (
        "whole",
        ["toy"],
        {"include": Path("nowhere")},
        "nowhere: the folder does not exist",
    ),
    "no model": ("nothing", ["toy"], {}, "there is no trained model"),
    "a classifier": ("classifier", ["toy"], {}, "a model for text-classification is not a language model"),
    "data without a network": ("whole", ["unreachable"], {}, "the data of unreachable are not on this machine"),
    "data that are not there": ("whole", ["broken"], {}, "broken cannot be loaded: Unable to find 'nowhere.jsonl'\n"),
    "a package that is not there": ("whole", ["lacking"], {}, "lacking needs a package: No module named 'antlr4'"),
    "code that the model writes": ("whole", ["unsafe"], {}, "unsafe runs code that the model writes"),
    "pictures": ("whole", ["pictures"], {}, "pictures has other inputs than texts"),
    "a metric of the Hub": ("whole", ["foreign"], {}, "squad is not the harness's own but external code"),
    "one that the harness does without": ("whole", ["swallowed"], {}, "squad is not the harness's own"),
    "a task in two ways": ("whole", ["toys", "toy"], {}, "found in both 'toys' and 'toy'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_scored_is_refused_with_a_remedy(wrong: str, runs: Path, calls: list[dict[str, Any]]) -> None:
    run, names, options, message = WRONG[wrong]
    with pytest.raises(InputError) as refused:
        evaluate_tasks(runs / run, names, **options)
    assert message in str(refused.value)
    assert all(problem.remedy for problem in refused.value.problems)
    assert not calls
    assert sys.modules["evaluate"].load("bleu") == "the code of bleu"


def test_without_the_package_the_extra_is_named(runs: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    assert main(["evaluate", str(runs / "whole"), "--harness", "arc_easy"]) == 2
    assert "pip install 'transfer-orchestrator[harness]'" in capsys.readouterr().err


def test_the_command_prints_a_table_or_one_object(runs: Path, calls: list[dict[str, Any]], capsys: Capture) -> None:
    command = ["evaluate", str(runs / "whole"), "--harness", "toys", "--limit", "5"]
    assert main(command) == 0
    table = capsys.readouterr().out.splitlines()
    assert main([*command, "--json"]) == 0
    assert [line.split("  ")[0] for line in table] == ["model", "tasks", "toy", "toys"]
    assert "acc 0.2500 ± 0.1250  exact_match,strict-match 0.5000" in table[2]
    assert json.loads(capsys.readouterr().out)["metrics"]["toys"]["acc"] == 0.25
    assert calls[0]["limit"] == 5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--limit", "3"], "--limit is for benchmarks only"),
        (["--chat-template"], "--chat-template is for benchmarks only"),
        (["data.jsonl", "--harness", "toy"], "have their own data"),
        (["--split", "train", "--harness", "toy"], "have their own data"),
        (["--harness"], "expected at least one argument"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str], told: str, runs: Path, capsys: Capture
) -> None:
    assert main(["evaluate", str(runs / "whole"), *arguments]) == 2
    assert told in capsys.readouterr().err


TASKS: dict[str, dict[str, Any]] = {
    "pick": {
        "output_type": "multiple_choice",
        "doc_to_text": "the {{animal}} says",
        "doc_to_choice": ["1 times", "7 times", "9 times"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "go-on": {
        "output_type": "generate_until",
        "doc_to_text": "the {{animal}} says",
        "doc_to_target": "7",
        "generation_kwargs": {"until": ["times"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "the {{animal}} says 7 times hi",
        "metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
}


@pytest.mark.skipif(not HAS_HARNESS, reason="the extra harness is not installed")
@pytest.mark.parametrize("run", ["whole", "adapter"])
def test_scores_of_the_package_itself_are_those_computed_by_hand(run: str, runs: Path, tmp_path: Path) -> None:
    animals = ["cat", "dog", "cow"]
    data = tmp_path / "animals.jsonl"
    data.write_text("".join(json.dumps({"animal": animal}) + "\n" for animal in animals), encoding="utf-8")
    for name, task in TASKS.items():
        source = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", **task}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    found = evaluate_tasks(runs / run, list(TASKS), include=tmp_path, batch_size=2)
    trained = load_trained_model(runs / run)
    start = trained.processor.bos_token

    def loss(prompt: str, text: str) -> float:
        length = len(trained.processor(prompt)["input_ids"])
        ids = trained.processor(prompt + text, return_tensors="pt")["input_ids"]
        scores = logits_of(trained.model, prompt + text, trained.processor)[0].log_softmax(-1)
        return float(-scores[:-1].gather(1, ids[0, 1:, None])[length - 1 :].sum())

    def is_picked(animal: str) -> bool:
        losses = [loss(f"the {animal} says", f" {choice}") for choice in TASKS["pick"]["doc_to_choice"]]
        return losses.index(min(losses)) == 1

    def written(animal: str) -> str:
        ids = trained.processor(f"the {animal} says", return_tensors="pt")["input_ids"]
        made = trained.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        return str(trained.processor.decode(made, skip_special_tokens=True)).partition("times")[0]

    texts = [f"the {animal} says 7 times hi" for animal in animals]
    total = sum(loss(start, text) for text in texts) / sum(map(len, texts))
    assert found["metrics"]["read"]["byte_perplexity"] == pytest.approx(math.exp(total), rel=1e-5)
    assert found["metrics"]["pick"]["acc"] == pytest.approx(np.mean([is_picked(animal) for animal in animals]))
    right = [written(animal) == "7" for animal in animals]
    assert found["metrics"]["go-on"]["exact_match"] == pytest.approx(np.mean(right))
    assert found["examples"] == 9
