"""Conversations as a model reads them, and which stretches of the text it is to learn.

A chat template (Jinja, from the tokenizer, a file, or one that ships here) turns a conversation into one text. What an
assistant said is found in it either by the marks that the template has for it (`{% generation %}`), or by rendering
the conversation again with that turn's content replaced: where the two texts begin to differ and end to differ is
where the content stands, whatever the template does to the turns around it. What the template writes after it, up to
where the header of the next turn begins, closes the answer, and is learned with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.data.fields.conversations import Sample
from orchestrator.data.fields.turns import Turn

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
    """Special tokens: the first one in what follows an answer ends it."""

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> Template:
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        ends = sorted({*added, *filter(None, [tokenizer.eos_token])}, key=len, reverse=True)
        return cls(text, dict(tokenizer.special_tokens_map), tuple(ends))

    @property
    def has_marks(self) -> bool:
        """Whether it says itself what an assistant generates."""
        return _MARKS.search(self.text) is not None

    def first_end(self, text: str) -> str | None:
        """Return the first special token in a text; of those that begin at the same place the longest."""
        found = [(text.index(token), -len(token), token) for token in self.ends if token in text]
        return min(found)[2] if found else None

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """Return the text, and the spans that the template marks as generated; raises what Jinja raises."""
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
    """Return the text of a template: one that ships, or a file's; None where there is neither."""
    if name in SHIPPED:
        return SHIPPED[name]
    path = Path(name)
    return path.read_text(encoding="utf-8") if path.is_file() else None


def render_sample(sample: Sample, template: Template, train_on: TrainOn) -> tuple[str, list[Span]]:
    """Return the text of a conversation, and the spans of it that are learned, in their order."""
    text, marked = template.render(sample.turns)
    if train_on == "all":
        return text, [(0, len(text))]
    answers = [number for number, turn in enumerate(sample.turns) if turn["role"] == "assistant"]
    learned = [number for number in answers if number >= sample.num_given]
    if train_on == "last":
        learned = learned[-1:]
    if len(marked) != len(answers):
        return text, [find_answer(sample.turns, number, text, template) for number in learned]
    spans = []
    for number, span in zip(answers, marked, strict=True):
        if number in learned:
            has_end = text[slice(*span)].rstrip().endswith(template.ends)
            spans.append(span if has_end else _close(sample.turns, number, text, span, template))
    return text, spans


def find_answer(turns: Sequence[Turn], number: int, text: str, template: Template) -> Span:
    """Return where the answer of turn `number` stands in the rendered text: from the end of the generation prompt to
    the end of what closes it.

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
    return _close(turns, number, text, (start, end), template)


def lacks_end(turns: Sequence[Turn], text: str, template: Template) -> bool:
    """Whether a rendered conversation ends with an answer after which no special token follows.

    Raises:
        ValueError: the template leaves the answer out.
    """
    if not turns or turns[-1]["role"] != "assistant":
        return False
    if text.rstrip().endswith(template.ends):
        return False
    _, end = _differing(turns, len(turns) - 1, text, template)
    return template.first_end(text[end:]) is None


def _differing(turns: Sequence[Turn], number: int, text: str, template: Template) -> Span:
    """Return where a turn's content, with its tool calls, stands: the part that changes with other content."""
    changed = {key: value for key, value in turns[number].items() if key != "tool_calls"} | {"content": _STAND_IN}
    other, _ = template.render([*turns[:number], changed, *turns[number + 1 :]])
    if _STAND_IN not in other:
        raise ValueError("the template leaves the answer out")
    begin = _common_length(text, other)
    return begin, len(text) - _common_length(text[begin:][::-1], other[begin:][::-1])


def _close(turns: Sequence[Turn], number: int, text: str, answer: Span, template: Template) -> Span:
    """Return the span of an answer, extended to the end of what closes it: up to the first special token, or to where
    the next turn begins.
    """
    start, end = answer
    after = text[end:]
    space = len(after) - len(after.lstrip())
    if not after[space:].startswith(template.ends) and number < len(turns) - 1:
        # What also follows the answer where it is the last turn belongs to no other turn.
        last, marked = template.render(turns[: number + 1])
        last_end = marked[-1][1] if marked else _differing(turns[: number + 1], number, last, template)[1]
        after = after[: _common_length(after, last[last_end:])]
    token = template.first_end(after)
    return start, end + (len(after) if token is None else after.index(token) + len(token))


def _common_length(first: str, second: str) -> int:
    """Return how many characters two texts begin with in common."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
