"""Talk with a trained language model in a terminal, its answers shown as they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import TextStreamer

from orchestrator.errors import InputError, Problem
from orchestrator.inference.trained_model import Wanted, load_trained
from orchestrator.tasks.bases.chat import Template
from orchestrator.tasks.bases.generation import end_tokens, plain_closing, without_closing
from orchestrator.tasks.bases.text import longest_conversation

FORGET, LEAVE = "/new", ("/quit", "/exit")


class Screen(TextStreamer):  # type: ignore[misc]
    """Writes what the model says, word by word, up to the text that closes an answer."""

    def __init__(self, tokenizer: Any, out: TextIO, closing: str = "") -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out
        self.closing = closing
        self.has_begun = False
        self.is_closed = False
        self.held_back = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = self._before_closing(text, stream_end)
        if not self.has_begun:
            text = text.lstrip()
            self.has_begun = bool(text)
        # A model may have learned to write what a terminal would obey.
        self.out.write("".join(letter for letter in text if letter.isprintable() or letter == "\n"))
        self.out.write("\n" if stream_end else "")
        self.out.flush()

    def _before_closing(self, text: str, stream_end: bool) -> str:
        """Return what is to be shown; text that may be the beginning of the closing waits for more."""
        if not self.closing or self.is_closed:
            return "" if self.is_closed else text
        before, found, _ = (self.held_back + text).partition(self.closing)
        self.is_closed = bool(found)
        waits = range(len(self.closing) - 1, 0, -1) if not found and not stream_end else ()
        size = next((size for size in waits if before.endswith(self.closing[:size])), 0)
        self.held_back = before[len(before) - size :]
        return before[: len(before) - size]


def chat(folder: Path, lines: TextIO, out: TextIO, system: str | None = None, precision: Wanted = "auto") -> None:
    """Answer each line until there are no more; `/new` starts over, `/quit` ends.

    Raises:
        InputError: the directory holds no trained language model.
    """
    trained = load_trained(folder, precision)
    if not trained.task.is_language_model:
        what = f"a model for {trained.task.name} does not talk"
        raise InputError(Problem(what, str(folder), "use: orchestrator predict"))
    tokenizer, options = trained.processor, trained.task.options
    template = Template.of(tokenizer, tokenizer.chat_template)
    ends, closing = end_tokens(trained.model, tokenizer, template), plain_closing(template)
    longest = longest_conversation(tokenizer, trained.model)
    system = system or options.system
    begin = [{"role": "system", "content": system}] if system else []
    turns = list(begin)
    ask = "> " if lines.isatty() else ""
    if ask:
        out.write(f"{trained.folder}: {FORGET} starts over, {LEAVE[0]} or Ctrl-D ends\n")
    while True:
        out.write(ask)
        out.flush()
        line = lines.readline()
        said = line.strip()
        if not line or said in LEAVE:
            return
        if said == FORGET:
            turns = list(begin)
        elif said:
            turns.append({"role": "user", "content": said})
            prompt = template.render(turns, add_generation_prompt=True)[0]
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(trained.device)
            if longest is not None:  # What was said long ago is forgotten.
                ids = ids[:, -max(1, longest - options.max_new_tokens) :]
            with torch.no_grad():
                written = trained.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=options.max_new_tokens,
                    do_sample=False,
                    eos_token_id=ends or None,
                    pad_token_id=tokenizer.pad_token_id,
                    streamer=Screen(tokenizer, out, closing),
                )
            answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
            turns.append({"role": "assistant", "content": without_closing(answer, closing)})
