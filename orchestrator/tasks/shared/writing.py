"""What a language model writes: prompts as it reads them, and its answers, the likeliest token each time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.data.conversations import Sample
from orchestrator.tasks.shared.chat import Template, render_sample
from orchestrator.tasks.shared.tokenizers import longest_input
from orchestrator.tasks.shared.tokens import tokenize

ANSWER = "so be it"


def as_prompt(sample: Sample, template: Template) -> str:
    """The text that the model goes on from: a conversation up to its last answer, or the beginning of a text."""
    if not sample.turns:
        return sample.prompt + sample.completion
    turns = list(sample.turns)
    if turns[-1]["role"] == "assistant":
        turns.pop()
    return template.render(turns, add_generation_prompt=True)[0]


def end_tokens(tokenizer: Any, template: Template) -> list[int]:
    """Tokens after which nothing more is written: the end of a text, and what closes an answer."""
    from jinja2 import TemplateError

    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER})
    closing: list[int] = []
    with contextlib.suppress(TemplateError, ValueError):
        text, (span,) = render_sample(Sample(turns=turns), template, "completions")
        after = text[slice(*span)].partition(ANSWER)[2].strip()
        closing = tokenizer(after, add_special_tokens=False)["input_ids"]
    known = [tokenizer.eos_token_id, *(closing if len(closing) == 1 else [])]
    return sorted({token for token in known if token is not None})


def write_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    are_chats: Sequence[bool],
    ends: list[int],
    batch_size: int,
    max_new_tokens: int,
    in_step: bool = False,
) -> list[str]:
    """What the model writes after each prompt.

    Args:
        are_chats: which prompts are conversations, with the special tokens that belong there in them.
        ends: tokens that end an answer; they are not part of it.
        in_step: go on until the other workers have ended too, for a model that is spread over them.
    """
    import torch

    longest = longest_input(tokenizer, model.config)
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
            answers[int(row)] = tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
    return answers
