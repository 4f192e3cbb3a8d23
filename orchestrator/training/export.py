"""Export a run: a model directory that plain transformers (or peft) loads, and the predictions."""

from __future__ import annotations

import contextlib
import shutil
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from orchestrator import models
from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.recipe import dump_recipe
from orchestrator.runs.directory import DESCRIPTION, write_json
from orchestrator.tasks.base import Arrays
from orchestrator.training.assembling import ModelParts, assemble
from orchestrator.training.engine.precision import Precision
from orchestrator.training.engine.weight_formats import may_load_as_stored
from orchestrator.training.model_card import model_card
from orchestrator.training.prepare import Prepared
from orchestrator.training.written_weights import save_whole, under_all_names, whole_state


class AfterTraining(contextlib.AbstractContextManager[None]):
    """Turns whatever fails inside into a RunFailed that says what is kept: the training itself is finished.

    Nothing inside may wait for other workers, whose death would be taken for such a failure.

    Args:
        checkpoint: the best one's place in the run directory.
        logs: where the traceback is printed to.
    """

    def __init__(self, checkpoint: str, logs: Path) -> None:
        self.checkpoint = checkpoint
        self.logs = logs

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, OrchestratorError):
            return
        traceback.print_exception(error)
        raise RunFailed(
            f"training is finished, with its best weights in {self.checkpoint}, but its model could not be written: "
            f"{type(error).__name__}: {error}\n"
            f"    -> the traceback is in {self.logs}; the same command goes on from there without training again"
        ) from error


def formats_to_write(prepared: Prepared, parts: ModelParts) -> models.StoredDtypes:
    """Return the formats that trained weights are written in: the source's, but an adapter stays in fp32."""
    if prepared.recipe.transfer.adapter is not None:
        return models.StoredDtypes()
    return models.stored_dtypes(prepared.source, models.load_config(prepared.source), parts.module)


def export_model(
    prepared: Prepared,
    parts: ModelParts,
    weights: dict[str, Tensor],
    formats: models.StoredDtypes,
    folder: Path,
    result: dict[str, Any],
    rebuild: Precision | None,
) -> None:
    """Write the model directory: safetensors, config, processor, model card. The folder appears whole or not at all.

    Args:
        weights: every trained parameter, by its name in `parts.module`, in its format.
        formats: what each weight is written in.
        result: the run's result, for the card.
        rebuild: the precision of training, where the model in `parts` was rounded for it or sharded over workers: what
            was not trained then comes from a model that is built again. None where it comes from that model.

    Raises:
        RunFailed: the adapter learned nothing.
    """
    module = parts.module
    for config, value in parts.caching:
        config.use_cache = value  # Those who generate with the model want it as it was.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if prepared.recipe.transfer.adapter is not None:
        refuse_untrained(parts, weights)
        module.save_pretrained(partial, state_dict=under_all_names(module, weights))
        extend_saved_adapter(prepared, parts, partial)
    else:

        def build_again() -> Any:
            assert rebuild is not None
            return assemble(prepared, may_load_as_stored(prepared.recipe, rebuild)).module

        state = whole_state(module, weights, formats, None if rebuild is None else build_again)
        save_whole(module, state, formats.main, partial)
    prepared.processor.save_pretrained(partial)
    if prepared.recipe.transfer.head.layers:
        models.write_deep_head_code(module, partial, prepared.task.auto_class)
    write_json(partial / DESCRIPTION, describe_model(prepared))
    (partial / "README.md").write_text(model_card(prepared, result, formats.main), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def extend_saved_adapter(prepared: Prepared, parts: ModelParts, folder: Path) -> None:
    """Add to a saved adapter what else the model has beyond the base that others will load it onto."""
    others = (
        [{name: (first, -second) for name, (first, second) in parts.initial_factors.items()}]
        if parts.initial_factors
        else []
    )
    if prepared.source.adapter is not None:
        others.append(models.read_lora_deltas(Path(prepared.source.adapter)))
    if prepared.recipe.transfer.adapter is None:
        return
    if others:
        models.extend_adapter(folder, others)
    if parts.module.get_base_model().can_generate():
        # peft saves none, so the base's own would hold.
        parts.module.generation_config.save_pretrained(folder)


def refuse_untrained(parts: ModelParts, weights: Mapping[str, Tensor]) -> None:
    """Raise RunFailed where the whole adapter is as it was before training.

    Args:
        weights: every trained parameter, by its name in `parts.module`.
    """
    if not models.has_learned(parts.module, parts.initial_factors, weights):
        raise RunFailed(
            "the adapter is as it was before training, so no model was written\n"
            "    -> raise train.learning_rate or the number of steps"
        )


def describe_model(prepared: Prepared) -> dict[str, Any]:
    """Return what `evaluate` and `predict` need besides the weights; transformers does not read it."""
    recipe = prepared.recipe
    return {
        "task": recipe.target.task,
        "options": recipe.target.options,
        "config": prepared.task.config_changes(),
        "recipe": dump_recipe(recipe),
    }


def write_predictions(prepared: Prepared, split: str, predictions: Arrays, path: Path) -> None:
    """Write one row an example: where it came from, its columns, the prediction with its scores."""
    examples = prepared.examples[split]
    columns: dict[str, Any] = {"source": [examples.where(row) for row in range(len(examples))]}
    columns.update({name: examples.table[name] for name in examples.table.column_names})
    columns.update(prepared.task.prediction_rows(predictions, examples))
    write_table(pa.table(columns), path)


def write_table(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    pq.write_table(table, temporary)
    temporary.replace(path)
