"""Build the parts of a training from a prepared recipe: model, head, frozen blocks, adapter, parameter groups."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from orchestrator import models
from orchestrator.errors import ModelError, Problem, raise_if_fatal
from orchestrator.models import Blocks, Frozen
from orchestrator.models.attempt import CallFailed
from orchestrator.training.parameter_groups import make_groups
from orchestrator.training.prepare import Prepared


@dataclass
class ModelParts:
    """The parts that an engine and the loop work with: the model, its blocks, and which parameters are trained."""

    module: Any
    """The model, with head and adapter."""
    body: Any
    """The source's body in it, without the head."""
    blocks: Blocks
    frozen: Frozen
    groups: list[dict[str, Any]]
    """Parameter groups for the optimizer."""
    head_is_new: bool
    """Whether the head's weights are random; otherwise the source's own head is tuned further."""
    new_parameters: frozenset[str]
    """Parameters that the source did not have, by their names before an adapter."""
    initial_factors: models.LoraDeltas = field(default_factory=dict)
    """What the adapter began with, which was taken out of the weights that it lies on."""
    caching: list[tuple[Any, bool]] = field(default_factory=list)
    """Configs whose `use_cache` training has turned off, with the value that they had."""

    def count_parameters(self) -> dict[str, int]:
        """Return the numbers of parameters; sharded ones (ZeRO-3) and those in 4 bits count in full."""
        sizes = [(_size(value), value.requires_grad) for value in self.module.parameters()]
        return {"total": sum(size for size, _ in sizes), "trained": sum(size for size, trained in sizes if trained)}


def assemble(prepared: Prepared, as_stored: bool = False) -> ModelParts:
    """Build the parts; the same recipe and seed give the same weights on every worker.

    Args:
        as_stored: leave weights in bf16 that are stored so. Such a model may be run inside `models.Fp32Compute` alone,
            until an engine has given its weights the formats that it computes with.

    Raises:
        ModelError: the source model cannot be used as the recipe asks.
    """
    transfer, seed = prepared.recipe.transfer, prepared.recipe.train.seed
    config = models.load_config(prepared.source, **prepared.task.config_changes())
    quantize = transfer.adapter.quantize if transfer.adapter is not None else None
    task = prepared.task
    loaded = models.load_model(
        prepared.source, task.auto_class, config, transfer.from_scratch, seed, quantize, as_stored, task.head == "new"
    )
    with models.Fp32ComputeMode() if as_stored else contextlib.nullcontext():
        return build_parts(prepared, loaded.model, loaded.new_parameters)


def assemble_outline(prepared: Prepared, new: frozenset[str] = frozenset(), **changes: Any) -> ModelParts | None:
    """Build the parts without values, and without reading weights; None for architectures that look into their inputs.

    Args:
        new: names of the parameters that the source does not have.
        changes: other values for the model's config.

    Raises:
        ModelError: as `assemble`.
    """
    config = models.load_config(prepared.source, **prepared.task.config_changes(), **changes)
    # Some architectures look into their inputs, which have no values here; those are checked when they are loaded.
    with torch.device("meta"), contextlib.suppress(RuntimeError, CallFailed):
        loaded = models.load_model(prepared.source, prepared.task.auto_class, config, from_scratch=True, seed=0)
        return build_parts(prepared, loaded.model, new)
    return None


def build_parts(prepared: Prepared, module: Any, new: frozenset[str]) -> ModelParts:
    """Build head, frozen blocks and adapter on a loaded model.

    Args:
        new: names of the parameters that the source does not have.
    """
    recipe = prepared.recipe
    transfer, seed = recipe.transfer, recipe.train.seed
    body = models.find_body(module)
    has_own_head = prepared.task.head != "kept"
    if has_own_head:
        with models.seeded(seed):
            new = models.set_head(module, transfer.head, new)
    prepared.task.configure_model(module, prepared.processor, prepared.source)
    blocks = find_blocks(prepared, module, new)
    where = recipe.origin.where("transfer.freeze")
    depth = models.resolve_depth(transfer.freeze, len(blocks.layers), where)
    frozen = models.freeze_blocks(module, blocks, depth)
    initial_factors: models.LoraDeltas = {}
    if transfer.adapter is not None:
        with models.seeded(seed):
            reaches_experts = setting_excluding_experts(prepared) is None
            module = models.add_adapter(module, blocks, depth, transfer.adapter, has_own_head, reaches_experts)
            if transfer.adapter.init == "pissa":
                initial_factors = models.init_pissa(module)
        blocks = models.adapted_blocks(module, blocks)
    frozen = replace(frozen, modules=(*frozen.modules, *models.frozen_norms(module)))
    raise_if_fatal(prepared.task.check_trained(module, recipe), ModelError)
    caching: list[tuple[Any, bool]] = []
    if recipe.train.gradient_checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
        caching = turn_off_caches(body.config)
    head_is_new = bool(new) or transfer.from_scratch
    parts = ModelParts(module, body, blocks, frozen, [], head_is_new, new, initial_factors, caching)
    parts.groups = make_groups(parts, recipe)
    return parts


def turn_off_caches(config: Any) -> list[tuple[Any, bool]]:
    """Set `use_cache` to False wherever a config, or its part for texts, has it; returns the values that were there.

    A decoder's key-value cache would be filled once more when its layers are computed again for the backward pass.
    """
    both = {id(each): each for each in (config, config.get_text_config())}.values()
    found = [(each, each.use_cache) for each in both if hasattr(each, "use_cache")]
    for each, _ in found:
        each.use_cache = False
    return found


def _size(parameter: Any) -> int:
    in_bits = getattr(parameter, "quant_state", None)
    whole = parameter.numel() if in_bits is None else in_bits.shape.numel()
    return int(getattr(parameter, "ds_numel", whole))


def setting_excluding_experts(prepared: Prepared) -> str | None:
    """Return the setting with which an adapter does not reach weights of experts; None where there is none."""
    recipe = prepared.recipe
    adapter = recipe.transfer.adapter
    if adapter is None:
        return None
    settings = {
        f"transfer.adapter.dropout: {adapter.dropout}": adapter.dropout > 0,
        f"transfer.adapter.variant: {adapter.variant}": adapter.variant == "dora",
        f"transfer.adapter.quantize: {adapter.quantize}": adapter.quantize is not None,
        # What is saved then is joined of several adapters, each on linear modules.
        f"transfer.adapter.init: {adapter.init}": adapter.init != "zero",
        f"source.model: {recipe.source.model}, an adapter": prepared.source.adapter is not None,
        f"scale.zero_stage: {recipe.scale.zero_stage}": recipe.scale.zero_stage == 3,
    }
    return next((setting for setting, holds in settings.items() if holds), None)


def check_experts(prepared: Prepared) -> list[Problem]:
    """Return a warning where an adapter on all linear modules leaves weights of experts as they are."""
    recipe, why = prepared.recipe, setting_excluding_experts(prepared)
    adapter = recipe.transfer.adapter
    if adapter is None or why is None or adapter.targets != "all-linear":
        return []
    config = models.load_config(prepared.source, **prepared.task.config_changes())
    with torch.device("meta"):
        model = models.load_model(prepared.source, prepared.task.auto_class, config, from_scratch=True, seed=0).model
    experts = [model.get_parameter(name).numel() for name in models.find_experts(model)]
    if not experts:
        return []
    share = sum(experts) / sum(value.numel() for value in model.parameters())
    what = f"the adapter leaves out the experts, which hold {share:.0%} of the weights of {prepared.source.name!r}"
    remedy = f"change {why}, with which peft does not reach them"
    return [Problem(what, recipe.origin.where("transfer.adapter"), remedy, fatal=False)]


def find_blocks(prepared: Prepared, module: Any, new: frozenset[str]) -> Blocks:
    """Return the model's blocks.

    Raises:
        ModelError: it cannot read what the task feeds it.
        CallFailed: its outline looks at the values of its inputs, which has none.
    """
    try:
        return models.find_blocks(module, prepared.task.example_inputs(prepared.processor), new)
    except CallFailed as error:
        # A ValueError is what transformers raises where inputs have the wrong size.
        if models.is_outline(module) and not isinstance(error.__cause__, ValueError):
            raise
        what = f"{prepared.source.name!r} cannot read the task's inputs: {error.__cause__}"
        where = prepared.recipe.origin.where("target.options")
        remedy = "set the task's options to what the source model was trained with (null, where they may be null); "
        remedy += "if it needs inputs of other kinds, use another one"
        raise ModelError(Problem(what, where, remedy)) from error


def check_structure(prepared: Prepared) -> ModelParts | None:
    """Refuse what does not fit the model (freeze depth, adapter targets, head) before anything starts, without weights.

    Returns:
        The parts, without values; None for architectures that look into their inputs.

    Raises:
        ModelError: as `assemble`.
    """
    adapter = prepared.recipe.transfer.adapter
    if adapter is not None and adapter.quantize is not None:
        models.check_quantization(prepared.source, prepared.recipe.origin.where("transfer.adapter.quantize"))
    parts = assemble_outline(prepared)
    for number, phase in enumerate(prepared.recipe.transfer.phases or []):
        if parts is not None and phase.freeze is not None:
            where = prepared.recipe.origin.where(f"transfer.phases.{number}.freeze")
            models.resolve_depth(phase.freeze, len(parts.blocks.layers), where)
    return parts
