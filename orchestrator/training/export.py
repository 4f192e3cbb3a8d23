"""What a run leaves for others: a model directory that plain transformers (or peft) loads, and test predictions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from orchestrator import models
from orchestrator.errors import RunFailed
from orchestrator.recipe import dump_recipe
from orchestrator.tasks.base import Arrays
from orchestrator.training.assemble import Parts, assemble
from orchestrator.training.model_card import model_card
from orchestrator.training.precision import Precision
from orchestrator.training.prepare import Prepared
from orchestrator.training.run_directory import DESCRIPTION, write_json
from orchestrator.training.weight_formats import may_load_as_stored

NAMED = 3


def export_model(
    prepared: Prepared,
    parts: Parts,
    weights: dict[str, Tensor],
    folder: Path,
    result: dict[str, Any],
    rebuild: Precision | None,
) -> None:
    """Write the model directory: safetensors, config, processor, model card. The folder appears whole or not at all.

    Args:
        weights: every trained parameter in fp32, by its name in `parts.module`.
        result: the run's result, for the card.
        rebuild: what the model in `parts` was trained in, where it was rounded for that or spread over workers: the
            weights are put into one built anew. None where they are put into it.

    Raises:
        RunFailed: a part of the adapter learned nothing.
    """
    if rebuild is not None:
        # Of an adapter's model nothing but the adapter is written.
        is_adapter = prepared.recipe.transfer.adapter is not None
        parts = assemble(prepared, as_stored=is_adapter and may_load_as_stored(prepared.recipe, rebuild))
    module = parts.module
    here = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in weights.items():
            here[name].copy_(value)
    if prepared.recipe.transfer.adapter is not None:
        refuse_untrained(parts)
    # Gradient checkpointing turned it off; those who generate with the model want it as it was.
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = models.load_config(prepared.source).use_cache
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    module.save_pretrained(partial)
    extend_saved_adapter(prepared, parts, partial)
    prepared.processor.save_pretrained(partial)
    if prepared.recipe.transfer.head.layers:
        models.write_deep_head_code(module, partial, prepared.task.auto_class)
    write_json(partial / DESCRIPTION, describe_model(prepared))
    (partial / "README.md").write_text(model_card(prepared, result), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def extend_saved_adapter(prepared: Prepared, parts: Parts, folder: Path) -> None:
    """Have a saved adapter say all that the model has beyond the base that others will load it onto."""
    others = [{name: (first, -second) for name, (first, second) in parts.taken.items()}] if parts.taken else []
    if prepared.source.adapter is not None:
        others.append(models.read_changes(Path(prepared.source.adapter)))
    if others and prepared.recipe.transfer.adapter is not None:
        models.extend_adapter(folder, others)


def refuse_untrained(parts: Parts) -> None:
    """Raise RunFailed where a part of the adapter is as it was before training, or empty."""
    untrained = list(models.find_untrained(parts.module, parts.taken))
    if untrained:
        some = ", ".join(untrained[:NAMED]) + (", ..." if len(untrained) > NAMED else "")
        raise RunFailed(
            f"{len(untrained)} parts of the adapter learned nothing ({some}), so no model was written\n"
            "    -> if the model does not use those modules, leave them out of transfer.adapter; "
            "else raise train.learning_rate or the number of steps"
        )


def describe_model(prepared: Prepared) -> dict[str, Any]:
    """What `evaluate` and `predict` need besides the weights; transformers does not read it."""
    recipe = prepared.recipe
    return {
        "task": recipe.target.task,
        "options": recipe.target.options,
        "config": prepared.task.config_changes(),
        "recipe": dump_recipe(recipe),
    }


def write_predictions(prepared: Prepared, split: str, predictions: Arrays, path: Path) -> None:
    """One row an example: where it came from, its columns, the prediction with its scores."""
    examples = prepared.examples[split]
    columns: dict[str, Any] = {"source": [examples.where(row) for row in range(len(examples))]}
    columns.update({name: examples.table[name] for name in examples.table.column_names})
    columns.update(prepared.task.prediction_rows(predictions))
    write_table(pa.table(columns), path)


def write_table(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    pq.write_table(table, temporary)
    temporary.replace(path)
