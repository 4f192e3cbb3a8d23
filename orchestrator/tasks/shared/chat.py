"""Conversations as a model reads them, and which stretches of the text it is to learn.

A chat template (Jinja, from the tokenizer, a file, or one that ships here) turns a conversation into one text. What an
assistant said is found in it either by the marks that the template has for it (`{% generation %}`), or by rendering
the conversation again with that turn's content replaced: where the two texts begin to differ and end to differ is
where the content stands, whatever the template does to the turns around it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.data.conversations import Sample
from orchestrator.data.turns import Turn

TrainOn = Literal["completions", "last", "all"]
Span = tuple[int, int]

# The plain one is for models that have never seen a chat: its words are ordinary text, and only the end of an answer
# is a token of its own. ChatML is OpenAI's, and that of Qwen and many others.
SHIPPED = {
    "plain": (
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
        "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "\ue0f1\ue0f2\ue0f1"  # Of the private use area: no content begins or ends with it.


@dataclass(frozen=True)
class Template:
    """A chat template with the tokens that it may name."""

    text: str
    tokens: dict[str, Any]
    """`bos_token`, `eos_token` and the like."""
    ends: tuple[str, ...]
    """Special tokens: the one that follows an answer ends it, and is learned with it."""

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> Template:
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        ends = sorted({*added, *filter(None, [tokenizer.eos_token])}, key=len, reverse=True)
        return cls(text, dict(tokenizer.special_tokens_map), tuple(ends))

    @property
    def has_marks(self) -> bool:
        """Whether it says itself what an assistant generates."""
        return _MARKS.search(self.text) is not None

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and what the template marks in it as generated; raises what Jinja raises."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marked = render_jinja_template(
            conversations=[list(turns)],
            chat_template=self.text,
            return_assistant_tokens_mask=self.has_marks,
            add_generation_prompt=add_generation_prompt,
            **self.tokens,
        )
        return texts[0], [(int(start), int(end)) for start, end in marked[0]] if self.has_marks else []


def read_template(name: str) -> str | None:
    """The text of a template: one that ships, or a file's; None where there is neither."""
    if name in SHIPPED:
        return SHIPPED[name]
    path = Path(name)
    return path.read_text(encoding="utf-8") if path.is_file() else None


def render_sample(sample: Sample, template: Template, train_on: TrainOn) -> tuple[str, list[Span]]:
    """The text of a conversation, and the stretches of it that are learned, in their order."""
    text, marked = template.render(sample.turns)
    if train_on == "all":
        return text, [(0, len(text))]
    answers = [number for number, turn in enumerate(sample.turns) if turn["role"] == "assistant"]
    learned = [number for number in answers if number >= sample.num_given]
    if train_on == "last":
        learned = learned[-1:]
    if len(marked) == len(answers):
        return text, [span for number, span in zip(answers, marked, strict=True) if number in learned]
    return text, [find_answer(sample.turns, number, text, template) for number in learned]


def find_answer(turns: Sequence[Turn], number: int, text: str, template: Template) -> Span:
    """Where the answer of turn `number` stands in the rendered text: from the end of the generation prompt to the end
    of the special token that closes it.

    Raises:
        ValueError: the template leaves the answer out.
    """
    start, end = _differing(turns, number, text, template)
    asked, _ = template.render(turns[:number], add_generation_prompt=True)
    if text.startswith(asked) and len(asked) <= start:
        # What stands between the generation prompt and the content (an empty thought) is generated, too.
        start = len(asked)
    else:
        # The template writes earlier turns otherwise when others follow.
        last, _ = template.render(turns[: number + 1])
        begin, _ = _differing(turns[: number + 1], number, last, template)
        between = last[len(asked) : begin] if last.startswith(asked) else ""
        start -= len(between) if text[:start].endswith(between) else 0
    return start, _end_of_answer(text, end, template)


def _differing(turns: Sequence[Turn], number: int, text: str, template: Template) -> Span:
    """Where a turn's content, with its tool calls, stands: what is not the same with something else in its place."""
    changed = {key: value for key, value in turns[number].items() if key != "tool_calls"} | {"content": _STAND_IN}
    other, _ = template.render([*turns[:number], changed, *turns[number + 1 :]])
    if _STAND_IN not in other:
        raise ValueError("the template leaves the answer out")
    begin = _common_length(text, other)
    return begin, len(text) - _common_length(text[begin:][::-1], other[begin:][::-1])


def _end_of_answer(text: str, end: int, template: Template) -> int:
    """The end with the special token that closes the answer, if one follows, perhaps after a space."""
    begin = end
    while begin < len(text) and text[begin].isspace():
        begin += 1
    closing = next((token for token in template.ends if text.startswith(token, begin)), None)
    return end if closing is None else begin + len(closing)


def _common_length(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
