"""Causal language modelling: which tokens count, what a run learns, what is refused."""

from __future__ import annotations

import io
import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from talk import ANSWERS, conversation

import orchestrator
from orchestrator.data.cache import as_table
from orchestrator.errors import InputError
from orchestrator.inference.chat import chat
from orchestrator.inference.predict import evaluate, predict
from orchestrator.tasks.base import Batch
from orchestrator.tasks.bases.language import IGNORED
from orchestrator.training.assembling import assemble
from orchestrator.training.prepare import Prepared, prepare

WriteRecipe = Callable[..., Path]


def prepared_of(path: Path) -> Prepared:
    return prepare(orchestrator.load_recipe(path))


def learned_text(prepared: Prepared, row: int) -> list[str]:
    """The stretches of an example that are learned, decoded."""
    encoded = prepared.encoded("train")
    targets = encoded.batch(np.array([row])).inputs["target_ids"][0]
    groups: list[list[int]] = []
    for position, token in enumerate(targets):
        if token != IGNORED:
            if position == 0 or targets[position - 1] == IGNORED:
                groups.append([])
            groups[-1].append(int(token))
    return [prepared.processor.decode(group) for group in groups]


def test_of_a_conversation_the_answers_and_their_ends_are_learned(write: WriteRecipe) -> None:
    prepared = prepared_of(write())
    expected = [" meow!", " meow meow", " meow!", " meow meow"]
    assert learned_text(prepared, 0) == [f"{text}<|endoftext|>" for text in expected]
    assert any("plain" in problem.what for problem in prepared.warnings)


def test_what_is_learned_can_be_chosen(write: WriteRecipe) -> None:
    assert learned_text(prepared_of(write({"train_on": "last"})), 0) == [" meow meow<|endoftext|>"]
    (everything,) = learned_text(prepared_of(write({"train_on": "all"})), 0)
    assert everything.startswith("ser: what does the cat say")


def test_a_text_is_learned_to_its_end_and_a_completion_after_its_prompt(write: WriteRecipe, tmp_path: Path) -> None:
    rows = {
        "texts": [{"text": f"once upon a time {number}"} for number in range(40)],
        "pairs": [{"prompt": f"{number} and 1 is", "completion": f" {number + 1}"} for number in range(40)],
    }
    found = {}
    for name, lines in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        prepared = prepared_of(write(data=str(path)))
        found[name] = learned_text(prepared, 0)
    assert found["texts"][0].startswith("nce upon a time")
    assert found["texts"][0].endswith("<|endoftext|>")
    assert found["pairs"] == [" 1<|endoftext|>"]


def test_in_a_mixture_each_example_is_read_as_by_itself(write: WriteRecipe, tmp_path: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "chats": [{"messages": conversation("cat", number)} for number in range(16)],
        "pairs": [{"prompt": f"{number} and 1 is", "completion": f" {number + 1}"} for number in range(16)],
        "texts": [{"text": f"once upon a time {number}"} for number in range(16)],
        "held": [{"instruction": f"say {number} times moo", "output": "moo " * number} for number in range(1, 20)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")

    def learned(*names: str) -> dict[str, list[str]]:
        train = [str(tmp_path / f"{name}.jsonl") for name in names]
        prepared = prepared_of(write(data={"train": train, "select": str(tmp_path / "held.jsonl")}))
        examples = prepared.examples["train"]
        return {examples.where(row): learned_text(prepared, row) for row in range(len(examples))}

    together = learned("chats", "pairs", "texts")
    alone = learned("chats") | learned("pairs") | learned("texts")
    shared = together.keys() & alone.keys()
    assert {Path(place.partition(":")[0]).stem for place in shared} == {"chats", "pairs", "texts"}
    assert all(together[place] == alone[place] for place in shared)
    assert {text[-1].endswith("<|endoftext|>") for text in together.values()} == {True}


def test_the_loss_is_the_mean_over_the_learned_tokens_as_transformers_has_it(write: WriteRecipe) -> None:
    prepared = prepared_of(write())
    parts, encoded, rows = assemble(prepared), prepared.encoded("train"), np.arange(6)
    batch = {name: torch.from_numpy(value) for name, value in encoded.batch(rows).inputs.items()}
    ours = prepared.task.loss(parts.module(**batch), Batch(batch, {}), encoded.totals(rows))
    targets = batch.pop("target_ids")
    labels = torch.cat([torch.full_like(targets[:, :1], IGNORED), targets[:, :-1]], 1)
    theirs = parts.module(**batch, labels=labels).loss
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "transfer", [{}, {"freeze": 1}, {"freeze": "all"}, {"freeze": 1, "adapter": {"type": "lora", "r": 4}}]
)
def test_it_learns_to_answer(transfer: dict[str, Any], write: WriteRecipe, tmp_path: Path) -> None:
    recipe = write(transfer=transfer, train={"epochs": 4, "learning_rate": 1.0e-2})
    run = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    before, after = run.result["before"]["test"], run.result["metrics"]["test"]
    assert before["nll"] == pytest.approx(np.log(257), rel=0.1)
    # An adapter alone can do little for a model that knows nothing.
    assert after["nll"] < before["nll"] - (0.2 if "adapter" in transfer else 0.5)
    assert after["perplexity"] == pytest.approx(np.exp(after["nll"]))
    assert after["loss"] == pytest.approx(after["nll"], rel=1e-5)
    assert after["token_accuracy"] > before["token_accuracy"]


def test_what_was_trained_loads_with_plain_transformers_or_peft(write: WriteRecipe, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, transfer in {"whole": {}, "adapter": {"adapter": {"type": "lora", "r": 4}}}.items():
        recipe = write(transfer=transfer, train={"epochs": 1})
        run = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / name)
        folder = run.directory / "model"
        loader = peft.AutoPeftModelForCausalLM if transfer else AutoModelForCausalLM
        model, tokenizer = loader.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        turns = [{"role": "user", "content": "what does the cat say?"}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
        scored = evaluate(run.directory, None, "test")
        assert scored["metrics"]["nll"] == pytest.approx(run.result["metrics"]["test"]["nll"], rel=1e-4)


def test_examples_that_lose_their_answers_are_told(write: WriteRecipe) -> None:
    warnings = prepared_of(write({"max_length": 60})).warnings
    assert any("reach 60 tokens and are cut there" in problem.what for problem in warnings)
    with pytest.raises(InputError, match="48 of 48 examples of train have no token left to learn"):
        prepared_of(write({"max_length": 30}))


@pytest.mark.parametrize(
    ("options", "sections", "expected"),
    [
        ({"chat_template": "chatlm"}, {}, "there is no chat template .*/chatlm"),
        ({"max_length": 513}, {}, "reads at most 512 tokens"),
        ({}, {"transfer": {"head": {"layers": [8]}}}, "takes no extra head layers"),
        ({"form": "alpaca"}, {}, "there is no column instruction"),
    ],
)
def test_wrong_recipes_are_refused(
    options: dict[str, Any], sections: dict[str, Any], expected: str, write: WriteRecipe
) -> None:
    with pytest.raises(InputError, match=expected):
        prepared_of(write(options, **sections))


def test_data_of_no_form_are_refused(write: WriteRecipe, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"question_text": "a"}\n' * 20, encoding="utf-8")
    with pytest.raises(InputError, match="there is none of the columns messages, conversations, prompt"):
        prepared_of(write(data=str(path)))
    path.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in "abcdefghijklmnopqrst"), encoding="utf-8")
    with pytest.raises(InputError, match="the file has only prompt of the columns that are known"):
        prepared_of(write(data=str(path)))


def test_a_template_that_fails_on_an_example_is_told_with_its_row(write: WriteRecipe, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('no system, please') }}", encoding="utf-8")
    with pytest.raises(InputError, match=r"train.jsonl:1.*\n?.*no system, please|no system, please"):
        prepared_of(write({"chat_template": str(template)}))


def test_encoding_in_parts_is_encoding_at_once(
    write: WriteRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepared = prepared_of(write({"system": "you are a farm"}))
    examples, processor = prepared.examples["train"], prepared.processor
    monkeypatch.setattr("orchestrator.tasks.bases.loss_mask.TEXTS_TOGETHER", 5)
    in_parts = as_table(prepared.task.encode(examples, processor))
    assert in_parts["input_ids"].num_chunks == 10
    assert in_parts.equals(prepared.tables["train"])
    whole, parts = prepared.encoded("train"), prepared.task.wrap(in_parts, processor)
    for name, values in whole.packed_batch(np.arange(48)[::-1]).inputs.items():
        np.testing.assert_array_equal(parts.packed_batch(np.arange(48)[::-1]).inputs[name], values)
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if 'number 9?' in m.content %}{{ raise_exception('no nines') }}{% endif %}"
        "{{ m.content }}\n{% endfor %}"
    )
    with pytest.raises(InputError, match=r"train.jsonl:10: the chat template fails: no nines"):
        prepared_of(write({"chat_template": str(template)}))


def test_a_system_prompt_is_put_before_conversations_without_one(write: WriteRecipe) -> None:
    prepared = prepared_of(write({"system": "you are a farm", "train_on": "all"}))
    assert "ystem: you are a farm" in learned_text(prepared, 0)[0]


def test_packed_examples_have_the_losses_that_they_have_by_themselves(write: WriteRecipe) -> None:
    prepared = prepared_of(write({"train_on": "all"}))
    encoded, parts = prepared.encoded("train"), assemble(prepared)
    rows = np.arange(9)
    padded, packed = encoded.batch(rows).inputs, encoded.packed_batch(rows).inputs
    assert (packed["target_ids"] != IGNORED).sum() == (padded["target_ids"] != IGNORED).sum()
    assert packed["input_ids"].size <= padded["input_ids"].size
    losses = []
    for arrays in (padded, packed):
        batch = {name: torch.from_numpy(values) for name, values in arrays.items()}
        losses.append(parts.module(**batch).token_losses[..., 0].sum())
    torch.testing.assert_close(losses[1], losses[0])


def test_packing_changes_no_loss_of_a_run(write: WriteRecipe, tmp_path: Path) -> None:
    losses = {}
    for pack in (True, False):
        recipe = write({"pack": pack, "train_on": "all"}, train={"epochs": 1, "log_every": 1})
        run = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / str(pack))
        rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        losses[pack] = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_toy: WriteRecipe, tiny_llama: Path, chats: Path) -> Path:
    """A run that has learned what animals say."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_toy(
        folder / "recipe.yaml",
        tiny_llama,
        chats,
        target={"task": "causal-lm", "data": str(chats), "options": {"max_length": 512, "max_new_tokens": 12}},
        train={"epochs": 25, "learning_rate": 1.0e-2, "evaluate_every": 150},
    )
    return orchestrator.train(orchestrator.load_recipe(recipe), folder / "run").directory


def test_it_writes_answers_to_prompts_whatever_the_batch(trained: Path, tmp_path: Path) -> None:
    rows = [{"messages": conversation(animal, number)[:1]} for number, animal in enumerate([*ANSWERS, "cat"])]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    for batch_size in (1, 3):
        output = tmp_path / f"{batch_size}.jsonl"
        assert predict(trained, str(data), output, batch_size, io.StringIO()) == 5
        found.append([json.loads(line)["prediction"] for line in output.read_text().splitlines()])
    assert found[0] == found[1]
    assert found[0][0] == found[0][4] == "meow!"
    assert len(set(found[0])) > 1


def test_prompts_and_instructions_are_answered_too(trained: Path, tmp_path: Path) -> None:
    for number, row in enumerate([{"prompt": "what does"}, {"instruction": "say moo"}, {"text": "Assistant:"}]):
        data = tmp_path / f"{number}.jsonl"
        data.write_text(json.dumps(row) + "\n", encoding="utf-8")
        out = io.StringIO()
        assert predict(trained, str(data), None, 4, out) == 1
        answered = json.loads(out.getvalue())
        assert isinstance(answered.pop("prediction"), str)
        assert answered == row
    data.write_text(json.dumps({"question": "what?"}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="none of the columns"):
        predict(trained, str(data), None, 4, io.StringIO())


def test_one_can_talk_with_it(trained: Path) -> None:
    out = io.StringIO()
    chat(
        trained,
        io.StringIO("what does the cat say, number 3?\n\n/new\nwhat does the dog say, number 5?\n/quit\nx\n"),
        out,
    )
    assert out.getvalue().splitlines() == ["meow!", "woof!"]


def test_only_language_models_talk(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    run = orchestrator.train(orchestrator.load_recipe(write_recipe(train={"epochs": 1})), tmp_path / "run")
    with pytest.raises(InputError, match="a model for text-classification cannot chat"):
        chat(run.directory, io.StringIO("hi\n"), io.StringIO())


def test_a_template_file_lies_beside_the_recipe_and_is_saved_with_the_model(write: WriteRecipe, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        encoding="utf-8",
    )
    recipe = write({"chat_template": "mine.jinja"}, train={"epochs": 1})
    run = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    template.unlink()
    scored = evaluate(run.directory, None, "test")
    assert scored["metrics"]["nll"] == pytest.approx(run.result["metrics"]["test"]["nll"], rel=1e-4)


def test_a_batch_that_has_nothing_to_learn_is_no_error(write: WriteRecipe, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    letters = string.ascii_letters[:40]
    rows = [{"prompt": letter * (100 if place % 2 else 5), "completion": "yes"} for place, letter in enumerate(letters)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = write({"max_length": 40}, data=str(path), train={"epochs": 1, "global_batch_size": 1, "log_every": 1})
    run = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in lines if row["split"] == "train"]
    assert 0.0 in losses
    assert max(losses) > 1.0


@pytest.fixture
def streamed(write: WriteRecipe, chats: Path, tmp_path: Path) -> Path:
    """A recipe that streams 24 of many conversations for each of two epochs."""
    animals = list(ANSWERS)
    rows = [{"messages": conversation(animals[number % 4], number)} for number in range(3000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "many.jsonl").write_text(lines, encoding="utf-8")
    splits = {name: str(chats / f"{name}.jsonl") for name in ("select", "test")}
    data = {"train": str(tmp_path / "many.jsonl"), "stream": True, **splits}
    path = write(data=data, train={"epochs": 2, "log_every": 1, "save_every": 2, "keep": 9})
    sections = yaml.safe_load(path.read_text())
    sections["target"]["limit"] = {"train": 24}
    path.write_text(yaml.safe_dump(sections))
    return path


def losses_of(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def test_a_streamed_run_is_repeated_and_resumed_with_the_same_losses(streamed: Path, tmp_path: Path) -> None:
    recipe = orchestrator.load_recipe(streamed)
    first, second = (orchestrator.train(recipe, tmp_path / name) for name in ("first", "second"))
    losses = losses_of(first.directory)
    assert len(losses) == 6
    assert losses_of(second.directory) == losses
    (second.directory / "result.json").unlink()
    for folder in sorted((second.directory / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    again = orchestrator.train(recipe, second.directory)
    assert again.resumed
    assert losses_of(again.directory) == losses
    assert again.result["metrics"] == first.result["metrics"]


def test_a_streamed_run_goes_on_with_its_own_examples_alone(streamed: Path, tmp_path: Path) -> None:
    run = orchestrator.train(orchestrator.load_recipe(streamed), tmp_path / "run")
    (run.directory / "result.json").unlink()
    with pytest.raises(InputError, match="the train data changed"):
        orchestrator.train(orchestrator.load_recipe(streamed, ["target.split.seed=1"]), run.directory)
    data = tmp_path / "many.jsonl"
    data.write_text(data.read_text().replace("number", "no."), encoding="utf-8")
    with pytest.raises(InputError, match="the train data changed"):
        orchestrator.train(orchestrator.load_recipe(streamed), run.directory)


def test_steps_say_how_much_is_streamed(streamed: Path) -> None:
    recipe = orchestrator.load_recipe(streamed, ["target.limit.train=null", "train.steps=7"])
    assert len(prepare(recipe).examples["train"]) == 7 * recipe.train.global_batch_size
