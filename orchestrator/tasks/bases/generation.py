"""What a language model writes: prompts as it reads them, and its answers, the likeliest token each time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.data.fields.conversations import Sample
from orchestrator.tasks.bases.chat import Template, render_sample
from orchestrator.tasks.bases.loss_mask import tokenize
from orchestrator.tasks.bases.text import longest_conversation

ANSWER = "so be it"
_ANSWERED = ({"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER})


def as_prompt(sample: Sample, template: Template) -> str:
    """Return the text that the model continues: a conversation up to its last answer, or the beginning of a text."""
    if not sample.turns:
        return sample.prompt + sample.completion
    turns = list(sample.turns)
    if turns[-1]["role"] == "assistant":
        turns.pop()
    return template.render(turns, add_generation_prompt=True)[0]


def closings(template: Template) -> list[str]:
    """Return the text that closes an answer amid a conversation, and that which closes the last answer.

    Where the template fails on several turns there is the last one alone, and nothing where it fails on one.
    """
    from jinja2 import TemplateError

    for turns in (_ANSWERED * 2, _ANSWERED):
        with contextlib.suppress(TemplateError, ValueError, TypeError):
            text, spans = render_sample(Sample(turns=turns), template, "completions")
            return [text[slice(*span)].partition(ANSWER)[2] for span in spans]
    return []


def plain_closing(template: Template) -> str:
    """Return the text that closes an answer where it holds no special token, without the spaces around it."""
    found = closings(template)
    return found[-1].strip() if found and template.first_end(found[-1]) is None else ""


def turn_marks(tokens: Sequence[str], template: Template) -> list[str]:
    """Return those of the tokens that a chat template writes around turns; where it fails, those that it names."""
    from jinja2 import TemplateError

    text = template.text
    with contextlib.suppress(TemplateError, ValueError, TypeError):
        text = template.render([*_ANSWERED, _ANSWERED[0]], add_generation_prompt=True)[0]
    return [token for token in tokens if token in text]


def end_tokens(model: Any, tokenizer: Any, template: Template) -> list[int]:
    """Return the tokens after which nothing more is written.

    They are the end-of-text token, the special tokens that end answers, and the special tokens at which the model's
    `generation_config` stops.
    """
    closing = [token for token in map(template.first_end, closings(template)) if token is not None]
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = {token for token in (stops if isinstance(stops, list) else [stops]) if token is not None}
    # A config class has ids of its own where a model tells none, and to its tokenizer they may be ordinary words.
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ends = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(closing), *(known & special)}
    return sorted(token for token in ends if token is not None)


def set_ends(model: Any, tokenizer: Any, template: Template) -> None:
    """Make `generate` stop at the same tokens by default, also after the model was saved and loaded.

    transformers saves no generation config that was changed and holds values that its other values leave without
    effect, such as a temperature without sampling. Of such a config only the tokens are kept.
    """
    from transformers import GenerationConfig

    if (config := getattr(model, "generation_config", None)) is None:
        return
    config.eos_token_id = end_tokens(model, tokenizer, template) or None
    config.pad_token_id = tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(config, name) for name in names})


def write_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    are_chats: Sequence[bool],
    ends: list[int],
    batch_size: int,
    max_new_tokens: int,
    in_step: bool = False,
    closing: str = "",
) -> list[str]:
    """Return the text that the model generates after each prompt.

    Args:
        are_chats: which prompts are conversations, with the special tokens that belong there in them.
        ends: tokens that end an answer; they are not part of it.
        in_step: go on until the other workers have ended too, for a model that is spread over them.
        closing: text that closes the answers of conversations, and is not part of them.
    """
    import torch

    longest = longest_conversation(tokenizer, model)
    encoded = [ids for ids, _ in tokenize(prompts, are_chats, tokenizer)]
    # Where there is no room for an answer after it, a prompt loses its beginning.
    ids = [row if longest is None else row[-max(1, longest - max_new_tokens) :] for row in encoded]
    order = np.argsort([-len(row) for row in ids], kind="stable")
    answers = [""] * len(ids)
    for some in np.split(order, range(batch_size, len(order), batch_size)):
        width = max(len(ids[row]) for row in some)
        batch = torch.full((len(some), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(batch)
        for place, row in enumerate(some):
            batch[place, width - len(ids[row]) :] = torch.tensor(ids[row])
            mask[place, width - len(ids[row]) :] = 1
        with torch.no_grad():
            written = model.generate(
                input_ids=batch.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                synced_gpus=in_step,
                eos_token_id=ends or None,
                pad_token_id=tokenizer.pad_token_id,
            )
        for row, tokens in zip(some, written[:, width:].tolist(), strict=True):
            length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
            answers[int(row)] = without_closing(text, closing if are_chats[int(row)] else "")
    return answers


def without_closing(text: str, closing: str) -> str:
    """Return an answer without what closes it, and without spaces around it."""
    return (text.partition(closing)[0] if closing else text).strip()
