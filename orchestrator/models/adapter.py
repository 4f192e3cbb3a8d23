"""Add low-rank adapters to the blocks above the freeze boundary, with peft."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from orchestrator.errors import ModelError, Problem, nearest
from orchestrator.models.blocks import Block, Blocks
from orchestrator.models.freeze import frozen_blocks
from orchestrator.recipe import Adapter, FrozenRange

ADAPTER_NAME = "default"
# peft imports it if it is installed, and it warns that a faster kernel for 4 bits is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def add_adapter(
    model: Any,
    blocks: Blocks,
    depth: FrozenRange,
    adapter: Adapter,
    trains_head: bool = True,
    reaches_experts: bool = True,
) -> Any:
    """Wrap a model so that only adapters in the layers above the boundary, and the head, are trained.

    The stem and the tail get no adapter. The head is trained whole, on a copy that is saved with the adapter; so are
    `modules_to_save`, and whatever else the source did not have. Adapters are drawn from the caller's random stream.

    Args:
        depth: what is frozen; no adapter goes below it.
        trains_head: False to leave the source's own head as it is.
        reaches_experts: whether weights of experts get an adapter, as a linear module does (see `find_experts`).

    Returns:
        A `peft.PeftModel`.

    Raises:
        ModelError: names that match nothing, or nothing above the boundary; extra head layers.
    """
    import peft

    if getattr(model.config, "deep_head", None) is not None:
        what = "extra head layers do not go with an adapter, because peft could not load the two onto the source model"
        raise ModelError(
            Problem(what, "transfer.head.layers", "set transfer.head.layers to [], or transfer.adapter to null")
        )
    head = _find_saved_modules(model, blocks) if trains_head else []
    saved = [*head, *(name for name in _find_named_modules(model, blocks, depth, adapter) if name not in head)]
    modules = dict(model.named_modules())
    found = [name for name in _find_targets(model, blocks, depth, adapter, reaches_experts) if name not in saved]
    through_weights = find_experts(model)
    targets = [name for name in found if name in modules and f"{name}.weight" not in through_weights]
    experts = [name if name in through_weights else f"{name}.weight" for name in found if name not in targets]
    config = peft.LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.variant == "rslora",
        use_dora=adapter.variant == "dora",
        fan_in_fan_out=bool(targets) and all(isinstance(modules[name], Conv1D) for name in targets),
        target_modules=targets,
        target_parameters=experts or None,
        modules_to_save=saved,
        ensure_weight_tying=_ties(model, saved),
    )
    wrapped = peft.get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    _check_trained(wrapped, targets, experts, saved)
    return wrapped


def adapted_blocks(model: Any, blocks: Blocks) -> Blocks:
    """Return the blocks after `add_adapter`, with the new names of parameters, each adapter in its module's block."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    in_order = blocks.in_order()
    owners = {name: block.name for block in in_order for name in block.parameters}
    for wrapper, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            prefix = f"{wrapper}."
            # None: a module tied to another one has no parameters of its own.
            owner = next((owners[name] for name in list(owners) if name.startswith(prefix)), None)
            if owner is not None:
                owners.update({f"{prefix}{name}": owner for name, _ in module.named_parameters()})
    # The wrapper of the whole model adds a prefix to each name.
    names = [name for name, _ in model.get_base_model().named_parameters()]
    prefixed = dict(zip(names, (name for name, _ in model.named_parameters()), strict=True))
    stem, *layers, tail, head = (
        replace(block, parameters=tuple(prefixed[name] for name in names if owners[name] == block.name))
        for block in in_order
    )
    return Blocks(stem, tuple(layers), tail, head, blocks.containers)


def find_experts(model: Any) -> list[str]:
    """Return the full names of the weights that peft reaches as parameters alone.

    They are the stacked weights of experts, of shape [experts, ..., ...], and the linear modules whose names peft takes
    for experts' of former versions of the model (`gate_proj` of a shared expert, for example).
    """
    found = []
    last_parts = {_last_part(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    renamed = {name for name in last_parts if _is_renamed(name, model)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _last_part(name) in renamed:
            found.append(f"{name}.weight")
        elif not isinstance(module, _ConvNd):
            own = module.named_parameters(recurse=False)
            found += [f"{name}.{part}" for part, weight in own if weight.dim() == 3 and len(weight) > 1]
    return found


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a module is linear. Routers of some mixtures of experts are subclasses of `nn.Linear` that are not."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward or not module.weight.is_floating_point():
        return True
    return isinstance(module(module.weight.new_zeros(1, module.in_features)), Tensor)


def _is_renamed(name: str, model: Any) -> bool:
    """Whether peft replaces a target with this name by another one."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # It joins several such names into one.
        return True
    return name not in (config.target_modules or ())


def _find_targets(model: Any, blocks: Blocks, depth: FrozenRange, adapter: Adapter, reaches_experts: bool) -> list[str]:
    """Return the full names of the linear modules, and of the experts' weights, that get an adapter."""
    new = set(blocks.head.parameters)
    names = {module: name for name, module in model.named_modules()}
    experts = find_experts(model)

    def linear_names(layers: tuple[Block, ...]) -> list[str]:
        inside = {names[module]: module for block in layers for module in block.modules}
        linear = [name for name, module in inside.items() if isinstance(module, Conv1D) or _is_linear(module)]
        kept = [name for name in linear if f"{name}.weight" not in new]
        if not reaches_experts:
            return [name for name in kept if f"{name}.weight" not in experts]
        return kept + [name for name in experts if name.rpartition(".")[0] in inside.keys() - set(linear)]

    everywhere, above = linear_names(blocks.layers), linear_names(blocks.layers[depth.num_layers :])
    if not everywhere:
        what = f"the layers of {type(model).__name__} hold no linear modules, which adapters go into"
        raise ModelError(Problem(what, "transfer.adapter", "set transfer.adapter to null"))
    if not above:
        what = f"no layer with linear modules is left above the freeze boundary ({depth.num_layers} frozen layers)"
        raise ModelError(Problem(what, "transfer.adapter", "lower transfer.freeze, or set transfer.adapter to null"))
    if isinstance(adapter.targets, str):
        return above
    return _matching(adapter.targets, everywhere, above, "linear module", "transfer.adapter.targets")


def _find_named_modules(model: Any, blocks: Blocks, depth: FrozenRange, adapter: Adapter) -> list[str]:
    """Return the full names of the modules that the recipe trains whole."""
    frozen = {module for block in frozen_blocks(blocks, depth) for module in block.modules}
    inside = {module for block in blocks.in_order() for module in block.modules}
    # peft does not copy modules that contain other modules with weights well.
    everywhere = {
        name: module
        for name, module in model.named_modules()
        if module in inside and any(True for _ in module.parameters(recurse=False))
    }
    above = [name for name, module in everywhere.items() if module not in frozen]
    return _matching(adapter.modules_to_save, list(everywhere), above, "module", "transfer.adapter.modules_to_save")


def _matching(wanted: list[str], everywhere: list[str], above: list[str], kind: str, place: str) -> list[str]:
    """Return the names above the boundary with a wanted last part; raises ModelError if one of them matches none."""
    problems = list(_check_names(wanted, everywhere, above, kind, place))
    if problems:
        raise ModelError(problems)
    return [name for name in above if _last_part(name) in wanted]


def _check_names(
    wanted: list[str], everywhere: list[str], above: list[str], kind: str, where: str
) -> Iterator[Problem]:
    valid = sorted({_last_part(name) for name in everywhere})
    trainable = sorted({_last_part(name) for name in above})
    for name in wanted:
        if name not in valid:
            close = nearest(name, valid)
            hint = f"did you mean {close}? " if close else ""
            yield Problem(f"{name!r} matches no {kind}", where, f"{hint}this model has: {', '.join(valid)}")
        elif name not in trainable:
            remedy = f"lower transfer.freeze, or use: {', '.join(trainable)}"
            yield Problem(f"{name!r} matches no {kind} above the freeze boundary", where, remedy)


def _ties(model: Any, saved: list[str]) -> bool:
    """Whether one of the modules shares its weights with another."""
    weights = [weight for name in saved for weight in model.get_submodule(name).parameters(recurse=False)]
    shared = [
        name for name, weight in model.named_parameters(remove_duplicate=False) if any(weight is w for w in weights)
    ]
    return len(shared) > len(weights)


def _last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _find_saved_modules(model: Any, blocks: Blocks) -> list[str]:
    """Return the full names of the outermost modules that hold only parameters of the head."""
    head = set(blocks.head.parameters)
    found: list[str] = []
    for name, module in model.named_modules():
        own = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
        if name and own and head.issuperset(own) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    covered = tuple(f"{name}." for name in found)
    if loose := sorted(name for name in head if not name.startswith(covered)):
        what = f"the weights lack {loose[0]}, a part of a module whose other parts they have, so no adapter fits it"
        raise ModelError(Problem(what, "transfer.adapter", "use complete weights, or set transfer.adapter to null"))
    return found


def trained_modules(model: Any) -> dict[str, dict[str, nn.Parameter]]:
    """Return the trained modules of a `PeftModel`, each with its parameters that get a gradient from the start.

    A module that is adapted counts by its second factor: as long as that one is zero, the first gets no gradient.

    Returns:
        By a module's name in the source, parameters by their names in `model`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    names = {id(value): name for name, value in model.named_parameters()}
    parts = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            found = module.lora_B[ADAPTER_NAME].parameters()
        elif isinstance(module, ModulesToSaveWrapper):
            found = module.modules_to_save[ADAPTER_NAME].parameters()
        else:
            continue
        parts[name] = {names[id(value)]: value for value in found if value.requires_grad}
    # A module that shares its weights with another one may have none of its own.
    return {name: values for name, values in parts.items() if values}


def has_learned(
    model: Any, initial_factors: Mapping[str, tuple[Tensor, Tensor]], weights: Mapping[str, Tensor]
) -> bool:
    """Whether any module of a `PeftModel` has changed in training. Modules trained whole are assumed to have.

    Args:
        initial_factors: the factors that the adapter began with, if the second was not zero.
        weights: the trained ones, by their names in `model`.
    """
    from peft.utils import ModulesToSaveWrapper

    for name, values in trained_modules(model).items():
        module = model.get_base_model().get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            return True
        _, start = initial_factors.get(name, (None, None))
        for each in values:
            scaled = weights[each] * module.scaling[ADAPTER_NAME]
            if scaled.any() and (start is None or not torch.equal(scaled, start.to(scaled))):
                return True
    return False


def _check_trained(wrapped: Any, targets: list[str], experts: list[str], saved: list[str]) -> None:
    """Assert that exactly the requested adapters, and the copies of modules that are saved whole, are trained."""
    from peft.tuners.lora import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = wrapped.get_base_model()
    tuned = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    # Several weights of one module have nested wrappers.
    around = [name for name, module in tuned.items() if isinstance(module, ParamWrapper)]
    adapted = {name for name in tuned if name not in around}
    adapted |= {f"{name.removesuffix('.base_layer')}.{tuned[name].parameter_name}" for name in around}
    assert adapted == {*targets, *experts}, f"adapters are in {adapted ^ {*targets, *experts}}"
    copies = tuple(f"{name}.modules_to_save.{ADAPTER_NAME}." for name in saved)
    frozen_parts = {f"{name}.base_layer.{part}" for name in targets for part in ("weight", "bias")}
    adapters = (*(f"{name}." for name in targets), *(f"{name}.lora_{part}." for name in around for part in "AB"))
    for name, parameter in base.named_parameters():
        expected = name.startswith(copies) or (name.startswith(adapters) and name not in frozen_parts)
        assert parameter.requires_grad == expected, f"requires_grad of {name} is wrong"
