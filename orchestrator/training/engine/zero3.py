"""ZeRO-3 sharding of a model that only the first worker loads. The others build its outline, and the parameters are
sharded over all workers one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.distributed import Exchange
from orchestrator.recipe import Recipe
from orchestrator.training.assembling import ModelParts, assemble, assemble_outline
from orchestrator.training.engine.deepspeed_config import init_distributed
from orchestrator.training.parameter_groups import make_groups
from orchestrator.training.prepare import Prepared


def is_sharded(recipe: Recipe) -> bool:
    """Whether the weights are sharded over several workers."""
    return recipe.scale.zero_stage == 3 and dist.is_initialized() and dist.get_world_size() > 1


def assemble_for_sharding(prepared: Prepared, exchange: Exchange, as_stored: bool = False) -> ModelParts:
    """Return the model on the first worker and its outline on the others. All workers call this.

    Where the structure of a model is known only with its weights, every worker loads it.

    Args:
        as_stored: as `assemble`.

    Raises:
        ModelError: as `assemble`, on all workers.
    """
    if not is_sharded(prepared.recipe):
        return assemble(prepared, as_stored)
    found: list[ModelParts] = []

    def load() -> frozenset[str]:
        found.append(assemble(prepared, as_stored))
        return found[0].new_parameters

    new = exchange.run_on_first(load)
    return found[0] if found else assemble_outline(prepared, new) or assemble(prepared, as_stored)


def shard_parameters(
    parts: ModelParts, recipe: Recipe, config: dict[str, Any], device: torch.device, exchange: Exchange
) -> None:
    """Shard the first worker's weights over all workers, and copy its other tensors. All workers call this.

    Args:
        config: DeepSpeed's.
    """
    import deepspeed

    init_distributed(device)
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    allocated: dict[int, nn.Parameter] = {}

    def allocate(parameter: nn.Parameter) -> nn.Parameter:
        """Return the parameter with memory for its values; the same one for modules that share it."""
        if parameter.is_meta and id(parameter) not in allocated:
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            allocated[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        return allocated.get(id(parameter), parameter)

    convert: Callable[..., None] | None = None
    for module in parts.module.modules():
        for name, outline in module.named_parameters(recurse=False):
            parameter = module._parameters[name] = allocate(outline)
            if hasattr(parameter, "ds_id"):  # DeepSpeed has sharded it already.
                continue
            parameter.data = parameter.data.to(dtype)
            if convert is None:
                # This takes half a second, so it is done once: a sharded parameter can shard others.
                deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=config, dtype=dtype)
                convert = parameter.convert_to_zero_parameters  # type: ignore[attr-defined]
            else:
                convert(param_list=[parameter])
    _copy_others(parts.module, device, exchange)
    parts.groups = make_groups(parts, recipe)


def _copy_others(model: nn.Module, device: torch.device, exchange: Exchange) -> None:
    """Copy the first worker's buffers, and tensors in other attributes of its modules, to the other workers."""
    modules = dict(model.named_modules())

    def tensor_dicts(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        return module._buffers, vars(module)

    # Only the first worker has run its model, which may have stored tensors.
    found = [
        (owner, kind, name, value.shape, value.dtype)
        for owner, module in modules.items()
        for kind, tensors in enumerate(tensor_dicts(module))
        for name, value in tensors.items()
        if isinstance(value, Tensor)
    ]
    for owner, kind, name, shape, dtype in exchange.broadcast(found):
        tensors = tensor_dicts(modules[owner])[kind]
        is_first = dist.get_rank() == 0
        value = (
            tensors[name].detach().to(device).contiguous()
            if is_first
            else torch.empty(shape, dtype=dtype, device=device)
        )
        # As bytes: not every backend supports bool.
        dist.broadcast(value.view(torch.uint8) if dtype == torch.bool else value, 0)
        tensors[name] = value
