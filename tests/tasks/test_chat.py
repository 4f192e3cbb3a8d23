"""Which stretches of a rendered conversation are learned, held against templates that mark them themselves."""

from __future__ import annotations

import random
from typing import Any

import pytest

from orchestrator.data.fields.conversations import Sample
from orchestrator.tasks.bases.chat import SHIPPED, Template, render_sample

# Each with marks around what an assistant generates; without the marks it is the template as models come with it.
MARKED = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "brackets, spaces, content trimmed": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% generation %} {{ m.content | trim }} {{ eos_token }}{% endgeneration %}"
        "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
    ),
    "thoughts, kept in the last answer only": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}"
        "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "headers, roles renamed": (
        "{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start>model\n{% endif %}"
    ),
    "no token ends an answer": (
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}### Answer: {% generation %}{{ m.content }}{% endgeneration %}{{ '\n' }}"
        "{% else %}### {{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Answer: {% endif %}"
    ),
}
WORDS = ("yes", "no", "assistant", "user", "<think>", "a b", "42", "Ünï", "\n", "[/INST]", "### Answer:", "the same")


def template_of(text: str) -> Template:
    return Template(text, {"bos_token": "<s>", "eos_token": "</s>"}, ("<|im_end|>", "</s>", "<s>"))


def without_marks(text: str) -> str:
    return text.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def draw_turns(stream: random.Random) -> tuple[dict[str, Any], ...]:
    def say(role: str) -> dict[str, Any]:
        words = stream.choices(WORDS, k=stream.randint(1, 4))
        return {"role": role, "content": " ".join(words).strip() or "so"}

    turns = [say("system")] if stream.random() < 0.5 else []
    for _ in range(stream.randint(1, 4)):
        turns += [say("user"), say("assistant")]
    return tuple(turns + ([say("user")] if stream.random() < 0.2 else []))


@pytest.mark.parametrize("name", MARKED)
def test_answers_are_found_where_a_template_with_marks_has_them(name: str) -> None:
    stream = random.Random(name)
    marked, plain = template_of(MARKED[name]), template_of(without_marks(MARKED[name]))
    for _ in range(150):
        sample = Sample(turns=draw_turns(stream))
        text, expected = render_sample(sample, marked, "completions")
        found_text, found = render_sample(sample, plain, "completions")
        assert found_text == text
        assert [text[slice(*span)] for span in found] == [text[slice(*span)] for span in expected]
        assert found == expected


@pytest.mark.parametrize("name", SHIPPED)
def test_templates_that_ship_end_answers_and_ask_as_they_answer(name: str) -> None:
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    template = template_of(SHIPPED[name])
    text, (span,) = render_sample(Sample(turns=turns), template, "completions")
    assert text[slice(*span)].strip().startswith("hello")
    assert text[slice(*span)].endswith(("</s>", "<|im_end|>"))
    asked, _ = template.render(turns[:1], add_generation_prompt=True)
    assert text.startswith(asked)


def test_the_last_answer_alone_or_everything_can_be_learned() -> None:
    turns = tuple(
        {"role": role, "content": content}
        for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    )
    template = template_of(SHIPPED["chatml"])
    text, (last,) = render_sample(Sample(turns=turns), template, "last")
    assert text[slice(*last)] == "d<|im_end|>"
    assert render_sample(Sample(turns=turns), template, "all") == (text, [(0, len(text))])


def test_turns_that_are_given_are_not_learned() -> None:
    turns = tuple(
        {"role": role, "content": content}
        for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    )
    text, spans = render_sample(Sample(turns=turns, num_given=3), template_of(SHIPPED["chatml"]), "completions")
    assert [text[slice(*span)] for span in spans] == ["d<|im_end|>"]


def test_calls_of_tools_are_learned() -> None:
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = (
        {"role": "user", "content": "what time is it"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "noon"},
    )
    rendered, spans = render_sample(Sample(turns=turns), template_of(text), "completions")
    assert [rendered[slice(*span)] for span in spans] == ["<call>clock</call><|im_end|>", "noon<|im_end|>"]


def test_a_template_that_leaves_answers_out_is_refused() -> None:
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    with pytest.raises(ValueError, match="leaves the answer out"):
        render_sample(Sample(turns=turns), template_of("{{ messages[0].content }}"), "completions")
