"""Copy a trained model out, its adapter as it is or folded into the weights that it changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from orchestrator import models
from orchestrator.errors import InputError, Problem, RunFailed
from orchestrator.training.model_card import card_of_merged
from orchestrator.training.run_directory import DESCRIPTION
from orchestrator.training.trained import (
    Trained,
    find_trained,
    holds_adapter,
    load_base,
    load_trained,
    put_adapter_on,
)

LARGEST_ERROR = 1e-4  # Of the largest output; fp32 sums in another order.


def export(folder: Path, output: Path, merge: bool) -> None:
    """Copy a trained model to a folder of its own; with `merge`, an adapter becomes part of the source's weights.

    Raises:
        InputError: the output exists, or there is no adapter to merge.
        RunFailed: the merged model would compute something else.
    """
    if output.exists():
        raise InputError(Problem("the output exists already", str(output), "name a folder that does not exist"))
    inner, _ = find_trained(folder)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if not merge:
        shutil.copytree(inner, partial)
    else:
        if not holds_adapter(inner):
            raise InputError(Problem("the model has no adapter to merge", str(folder), "export it without --merge"))
        # In main memory, which holds more than a GPU does.
        trained = load_trained(folder, "fp32", torch.device("cpu"))
        merged_weights(trained).save_pretrained(partial)
        trained.processor.save_pretrained(partial)
        card = (inner / "README.md").read_text(encoding="utf-8")
        (partial / "README.md").write_text(card_of_merged(card, trained.task), encoding="utf-8")
        shutil.copy(inner / DESCRIPTION, partial)
    partial.rename(output)


def merged_weights(trained: Trained) -> Any:
    """The model with its adapter folded in, which is not left as it was; weights in 4 bits become whole.

    Raises:
        RunFailed: it computes something else than before.
    """
    inputs = trained.task.example_inputs(trained.processor)
    before = answer(trained.model, inputs)
    model = trained.model
    if models.quantized_layers(model):
        # peft would round the sum to 4 bits again.
        base, source = load_base(trained.folder, trained.description, trained.task.auto_class)
        base.dequantize(torch.float32)
        trained.task.fit_model(base, trained.processor, source)
        model = put_adapter_on(base, trained.folder)
    merged = model.merge_and_unload().eval()
    after = answer(merged, inputs)
    error = float((after - before).abs().max() / before.abs().max())
    if not error <= LARGEST_ERROR:
        raise RunFailed(
            f"with the adapter merged, the model's outputs differ by {error:.1e} of their size; nothing was written\n"
            "    -> export it without --merge, and load it with peft"
        )
    return merged


@torch.no_grad()
def answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What a model makes of one example, as numbers on the CPU."""
    logits: torch.Tensor = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits
    return logits.float().cpu()
