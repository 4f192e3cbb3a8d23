"""Chat with a trained language model in a terminal; answers are shown as they are generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import TextStreamer

from orchestrator.errors import InputError, Problem
from orchestrator.inference.trained_model import PrecisionChoice, TrainedModel, load_trained_model
from orchestrator.tasks.bases.chat import Template
from orchestrator.tasks.bases.generation import end_tokens, plain_closing, without_closing
from orchestrator.tasks.bases.text import longest_conversation

RESTART, QUIT = "/new", ("/quit", "/exit")


class TerminalStreamer(TextStreamer):  # type: ignore[misc]
    """Shows an answer word by word, up to the text that closes it."""

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
        # A model may have learned to write terminal escapes.
        self.out.write("".join(letter for letter in text if letter.isprintable() or letter == "\n"))
        self.out.write("\n" if stream_end else "")
        self.out.flush()

    def _before_closing(self, text: str, stream_end: bool) -> str:
        """Return the text to show; text that may be the beginning of the closing is held back."""
        if not self.closing or self.is_closed:
            return "" if self.is_closed else text
        before, found, _ = (self.held_back + text).partition(self.closing)
        self.is_closed = bool(found)
        waits = range(len(self.closing) - 1, 0, -1) if not found and not stream_end else ()
        size = next((size for size in waits if before.endswith(self.closing[:size])), 0)
        self.held_back = before[len(before) - size :]
        return before[: len(before) - size]


class Conversation:
    """A conversation with a trained language model.

    Args:
        system: the system prompt; None for none.
    """

    def __init__(self, trained: TrainedModel, system: str | None) -> None:
        self.trained = trained
        self.tokenizer = trained.processor
        self.template = Template.of(self.tokenizer, self.tokenizer.chat_template)
        self.ends = end_tokens(trained.model, self.tokenizer, self.template)
        self.closing = plain_closing(self.template)
        self.longest = longest_conversation(self.tokenizer, trained.model)
        self.system = system
        self.restart()

    def restart(self) -> None:
        self.turns = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str, out: TextIO) -> None:
        """Add the user's turn, and generate the answer, which is shown on `out`."""
        self.turns.append({"role": "user", "content": text})
        prompt = self.template.render(self.turns, add_generation_prompt=True)[0]
        ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(self.trained.device)
        max_new_tokens = self.trained.task.options.max_new_tokens
        if self.longest is not None:  # The oldest turns are dropped.
            ids = ids[:, -max(1, self.longest - max_new_tokens) :]
        with torch.no_grad():
            written = self.trained.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.ends or None,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=TerminalStreamer(self.tokenizer, out, self.closing),
            )
        answer = self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        self.turns.append({"role": "assistant", "content": without_closing(answer, self.closing)})


def chat(
    folder: Path, lines: TextIO, out: TextIO, system: str | None = None, precision: PrecisionChoice = "auto"
) -> None:
    """Answer each line of `lines`; `/new` starts a new conversation, `/quit` ends.

    Raises:
        InputError: the directory holds no trained language model.
    """
    trained = load_trained_model(folder, precision)
    if not trained.task.is_language_model:
        what = f"a model for {trained.task.name} cannot chat"
        raise InputError(Problem(what, str(folder), "use: orchestrator predict"))
    conversation = Conversation(trained, system or trained.task.options.system)
    mark = "> " if lines.isatty() else ""
    if mark:
        out.write(f"{trained.folder}: {RESTART} starts a new conversation, {QUIT[0]} or Ctrl-D ends\n")
    while True:
        out.write(mark)
        out.flush()
        line = lines.readline()
        text = line.strip()
        if not line or text in QUIT:
            return
        if text == RESTART:
            conversation.restart()
        elif text:
            conversation.answer(text, out)
