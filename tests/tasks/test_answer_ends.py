"""Where answers end: learned with every chat template, and where predict, generate and what is exported stop."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from talk import ANSWERS
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import orchestrator
from orchestrator.data.fields.conversations import Sample
from orchestrator.inference.chat import TerminalStreamer
from orchestrator.inference.merge import export
from orchestrator.inference.predict import predict
from orchestrator.tasks.bases.chat import SHIPPED, Template
from orchestrator.tasks.bases.generation import end_tokens, plain_closing, set_ends
from orchestrator.tasks.bases.loss_mask import encode_samples
from orchestrator.training.prepare import prepare

WriteRecipe = Callable[..., Path]
# Each with its tokens, and what it writes between an answer and the header of the next turn.
TEMPLATES: dict[str, tuple[str, list[str], str]] = {
    "plain": (SHIPPED["plain"], [], "<|endoftext|>\n"),
    "chatml": (SHIPPED["chatml"], ["<|im_start|>", "<|im_end|>"], "<|im_end|>\n"),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ["<|user|>", "<|assistant|>", "<|system|>"],
        "<|endoftext|>\n",
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>\n",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        ["[INST]", "[/INST]"],
        "<|endoftext|>",
    ),
    "a closing before a token": (
        "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }} (over)\n<stop>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant: {% endif %}",
        ["<turn>", "<stop>"],
        " (over)\n<stop>\n",
    ),
    "plain text": (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n</{{ m.role }}>\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}",
        [],
        "\n</assistant>\n\n",
    ),
    "nothing": (
        "{% for m in messages %}\n# {{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}\n# assistant: {% endif %}",
        [],
        "",
    ),
    "marks around the content alone": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>\n",
    ),
}
WORDS = ("yes", "no", "assistant", "user:", "a b", "42", "Ünï", "# so", "[/INST", "the same", "</assist")


def draw_turns(stream: random.Random) -> tuple[dict[str, Any], ...]:
    def say(role: str) -> dict[str, Any]:
        return {"role": role, "content": " ".join(stream.choices(WORDS, k=stream.randint(1, 4)))}

    return tuple(say(role) for _ in range(stream.randint(1, 3)) for role in ("user", "assistant"))


def with_special(tokenizer: Any, tokens: list[str]) -> Any:
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("train_on", ["completions", "last", "all"])
@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_is_learned_with_what_closes_it_and_the_last_one_with_a_token_that_ends_it(
    name: str, has_tokens: bool, train_on: Any, tiny_gpt2: Path
) -> None:
    text, tokens, after = TEMPLATES[name]
    tokenizer = with_special(AutoTokenizer.from_pretrained(tiny_gpt2), tokens if has_tokens else [])
    template = Template.of(tokenizer, text)
    specials = ["<|endoftext|>", *(tokens if has_tokens else [])]
    special = next((token for token in specials if token in after), None)
    ends = end_tokens(None, tokenizer, template)
    stream = random.Random(name)
    for _ in range(20):
        turns = draw_turns(stream)
        (ids,), (learned,) = encode_samples([Sample(turns=turns)], tokenizer, template, train_on, 9999).columns
        own, flags = ids.as_py(), learned.as_py()
        # What the template writes, and nothing else but an end where it has none.
        written = tokenizer(template.render(turns)[0], add_special_tokens=False)["input_ids"]
        assert own == written + ([] if special else [tokenizer.eos_token_id])
        said = tokenizer.decode([token for token, flag in zip(own, flags, strict=True) if flag])
        if train_on == "all":
            assert said == tokenizer.decode(own[1:])
            continue
        answers = [turn["content"] for turn in turns[1::2]]
        closing = after if special is None else after.partition(special)[0] + special
        expected = [f"{answer}{closing}" for answer in (answers if train_on == "completions" else answers[-1:])]
        assert said.replace(" ", "") == "".join([*expected, "" if special else "<|endoftext|>"]).replace(" ", "")
        last = max(place for place, flag in enumerate(flags) if flag)
        assert own[last] in ends


def test_a_header_that_is_a_token_ends_an_answer_and_writing_stops_at_it(tiny_gpt2: Path) -> None:
    """As in GLM-4's template, which writes nothing after answers."""
    text = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = with_special(AutoTokenizer.from_pretrained(tiny_gpt2), ["<|user|>", "<|assistant|>"])
    template = Template.of(tokenizer, text)
    turns = tuple({"role": role, "content": "so"} for role in ("user", "assistant") * 2)
    (ids,), (learned,) = encode_samples([Sample(turns=turns)], tokenizer, template, "completions", 99).columns
    said = [token for token, flag in zip(ids.as_py(), learned.as_py(), strict=True) if flag]
    assert tokenizer.decode(said).replace("\n", "") == "so<|user|>so<|endoftext|>"
    assert end_tokens(None, tokenizer, template) == sorted(
        tokenizer.convert_tokens_to_ids(["<|user|>", "<|endoftext|>"])
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_an_end_of_text_token_the_closing_is_learned(name: str, tiny_gpt2: Path) -> None:
    text, tokens, after = TEMPLATES[name]
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.eos_token = None
    template = Template.of(tokenizer, text)
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    try:
        (ids,), (learned,) = encode_samples([Sample(turns=turns)], tokenizer, template, "completions", 999).columns
    except ValueError as error:
        assert "eos_token" in text and "eos_token" in str(error)
        return
    said = tokenizer.decode([token for token, flag in zip(ids.as_py(), learned.as_py(), strict=True) if flag])
    assert said.strip() == f"b{after.replace('<|endoftext|>', '')}".strip()
    assert not set(tokens).intersection(map(tokenizer.decode, end_tokens(None, tokenizer, template)))


def test_ordinary_words_end_nothing_whatever_a_config_class_says(tiny_gpt2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    template = Template.of(tokenizer, SHIPPED["plain"])
    model.generation_config.eos_token_id = [2, tokenizer.eos_token_id]
    assert end_tokens(model, tokenizer, template) == [tokenizer.eos_token_id]
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    # The source stops at a token that the template does not show, such as one for the result of a tool.
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<tool>")
    assert tokenizer.convert_tokens_to_ids("<tool>") in end_tokens(model, tokenizer, template)


def test_a_generation_config_that_transformers_would_not_save_is_no_obstacle(tiny_gpt2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    AutoModelForCausalLM.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "do_sample": False, "eos_token_id": 5}), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    set_ends(model, tokenizer, Template.of(tokenizer, SHIPPED["plain"]))
    model.save_pretrained(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [tokenizer.eos_token_id]


def test_tokens_around_turns_are_special_and_those_in_answers_are_text(write: WriteRecipe, tmp_path: Path) -> None:
    template = tmp_path / "calls.jinja"
    template.write_text(
        "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.name }}{% endfor %}<end>{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant: {% endif %}",
        encoding="utf-8",
    )
    names = ["<moo>", "<turn>", "<call>", "<end>"]
    prepared = prepare(
        orchestrator.load_recipe(write({"chat_template": str(template), "add_tokens": names, "max_length": 512}))
    )
    tokenizer = prepared.processor
    assert tokenizer.convert_tokens_to_ids(names) == list(range(len(tokenizer) - 4, len(tokenizer)))
    text = "<turn>assistant: <moo><call>clock<end>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "assistant: <moo><call>clock"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chat_template": "chatml"}, '"<|im_end|>\\n", not with a special token; <|endoftext|> follows'),
        ({"chat_template": "chatml", "add_tokens": ["<|im_start|>", "<|im_end|>"]}, None),
        ({"chat_template": "plain"}, None),
        ({}, None),
    ],
)
def test_whoever_ends_answers_with_plain_text_is_told(
    options: dict[str, Any], words: str | None, write: WriteRecipe
) -> None:
    warnings = prepare(orchestrator.load_recipe(write(options))).warnings
    told = [problem.what for problem in warnings if "closes answers" in problem.what]
    assert len(told) == (words is not None)
    assert words is None or words in told[0]


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    rows = [
        {"messages": [{"role": "user", "content": f"{n} {animal}"}, {"role": "assistant", "content": ANSWERS[animal]}]}
        for n in range(12)
        for animal in ANSWERS
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


MARKS = ["<|im_start|>", "<|im_end|>"]
WHOLE = {"adapter": {"type": "lora", "r": 8, "modules_to_save": ["embed_tokens", "lm_head"]}}


@pytest.mark.parametrize(
    ("options", "transfer", "closing"),
    [
        ({"chat_template": "chatml"}, {}, "<|im_end|>"),
        ({"chat_template": "chatml", "add_tokens": MARKS}, {}, ""),
        ({"chat_template": "chatml", "add_tokens": MARKS}, WHOLE, ""),
        ({"chat_template": "plain text"}, {}, "</assistant>"),
    ],
)
def test_a_trained_model_stops_where_its_answers_ended_in_predict_in_generate_and_after_export(
    options: dict[str, Any],
    transfer: dict[str, Any],
    closing: str,
    write: WriteRecipe,
    questions: Path,
    tmp_path: Path,
) -> None:
    if options["chat_template"] in TEMPLATES and options["chat_template"] not in SHIPPED:
        file = tmp_path / "template.jinja"
        file.write_text(TEMPLATES[options["chat_template"]][0], encoding="utf-8")
        options = {**options, "chat_template": str(file)}
    recipe = write(
        {**options, "max_length": 128, "max_new_tokens": 60},
        data=str(questions),
        transfer=transfer,
        train={"epochs": 30, "learning_rate": 1.0e-2, "global_batch_size": 8, "evaluate_every": 150},
    )
    run = orchestrator.train(orchestrator.load_recipe(recipe), tmp_path / "run")
    folder = run.directory / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "3 cow"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    if transfer:
        models = [peft.AutoPeftModelForCausalLM.from_pretrained(folder)]
        models[0].generation_config = GenerationConfig.from_pretrained(folder)  # As the card says.
        export(run.directory, tmp_path / "merged", merge=True)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    else:
        models = [AutoModelForCausalLM.from_pretrained(folder)]
    for model in models:
        written = model.eval().generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :].tolist()
        ends = model.generation_config.eos_token_id
        assert ends == end_tokens(None, tokenizer, Template.of(tokenizer, tokenizer.chat_template))
        assert len(written) < 60
        assert written[-1] in ends
        said = tokenizer.decode(written, skip_special_tokens=True).strip()
        assert said.endswith(closing)
    asked, out = tmp_path / "asked.jsonl", io.StringIO()
    asked.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    predict(folder, str(asked), None, 1, out)
    answer = json.loads(out.getvalue())["prediction"]
    assert f"{answer}{closing}" in (said, said.replace("\n", ""))
    assert closing == "" or closing not in answer


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_a_chat_shows_no_closing_however_the_words_come(size: int, tiny_gpt2: Path) -> None:
    said, closing = "a </b> c </assist and so on", "</assistant>"
    for after in ("", closing, f"{closing}\n### user:\nmore"):
        out = io.StringIO()
        screen = TerminalStreamer(AutoTokenizer.from_pretrained(tiny_gpt2), out, closing)
        text = f"\n{said}{after}"
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        for number, piece in enumerate(pieces):
            screen.on_finalized_text(piece, stream_end=number == len(pieces) - 1)
        assert out.getvalue() == f"{said}\n"


def test_the_closing_is_that_of_the_template_unless_a_token_is_in_it(tiny_gpt2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    assert plain_closing(Template.of(tokenizer, SHIPPED["chatml"])) == "<|im_end|>"
    assert plain_closing(Template.of(tokenizer, SHIPPED["plain"])) == ""
    with_special(tokenizer, MARKS)
    assert plain_closing(Template.of(tokenizer, SHIPPED["chatml"])) == ""
