"""ZeRO-3 with one whole model among all workers: the first one loads it, the others have its outline, and every
parameter is spread over all of them, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.distributed import Exchange
from orchestrator.recipe import Recipe
from orchestrator.training.assembling import Parts, assemble, assemble_outline
from orchestrator.training.engine.deepspeed_config import compile_nothing
from orchestrator.training.parameter_groups import make_groups
from orchestrator.training.prepare import Prepared


def is_spread(recipe: Recipe) -> bool:
    """Whether the weights are spread over several workers."""
    return recipe.scale.zero_stage == 3 and dist.is_initialized() and dist.get_world_size() > 1


def assemble_share(prepared: Prepared, exchange: Exchange, as_stored: bool = False) -> Parts:
    """The parts on the first worker, their outline on the others. All workers call this.

    Where a model's structure shows only with its weights, every worker has them.

    Args:
        as_stored: as `assemble`.

    Raises:
        ModelError: as `assemble`, on all workers.
    """
    if not is_spread(prepared.recipe):
        return assemble(prepared, as_stored)
    found: list[Parts] = []

    def load() -> frozenset[str]:
        found.append(assemble(prepared, as_stored))
        return found[0].new_parameters

    new = exchange.first_does(load)
    return found[0] if found else assemble_outline(prepared, new) or assemble(prepared, as_stored)


def spread(parts: Parts, recipe: Recipe, config: dict[str, Any], device: torch.device, exchange: Exchange) -> None:
    """Spread the first worker's weights; other tensors of its model are copied. All workers call this.

    Args:
        config: DeepSpeed's.
    """
    import deepspeed

    compile_nothing()
    # Without the name it does not look for the workers' group where there is no GPU.
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    filled: dict[int, nn.Parameter] = {}

    def fill(parameter: nn.Parameter) -> nn.Parameter:
        """The parameter, with room for its values where it is an outline; the same one for weights that are shared."""
        if parameter.is_meta and id(parameter) not in filled:
            room = torch.empty(parameter.shape, dtype=dtype, device=device)
            filled[id(parameter)] = nn.Parameter(room, requires_grad=parameter.requires_grad)
        return filled.get(id(parameter), parameter)

    convert: Callable[..., None] | None = None
    for module in parts.module.modules():
        for name, outline in module.named_parameters(recurse=False):
            parameter = module._parameters[name] = fill(outline)
            if hasattr(parameter, "ds_id"):  # As DeepSpeed marks what it has spread already.
                continue
            parameter.data = parameter.data.to(dtype)
            if convert is None:
                # Setting this up takes half a second, so it is done once: what is spread can spread others.
                deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=config, dtype=dtype)
                convert = parameter.convert_to_zero_parameters  # type: ignore[attr-defined]
            else:
                convert(param_list=[parameter])
    _copy_others(parts.module, device, exchange)
    parts.groups = make_groups(parts, recipe)


def _copy_others(model: nn.Module, device: torch.device, exchange: Exchange) -> None:
    """Copy the first worker's buffers, and tensors that its modules keep beside them, to the others."""
    modules = dict(model.named_modules())

    def homes(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        return module._buffers, vars(module)

    # Only the first worker's model has been run, and may have kept something.
    found = [
        (owner, kind, name, value.shape, value.dtype)
        for owner, module in modules.items()
        for kind, home in enumerate(homes(module))
        for name, value in home.items()
        if isinstance(value, Tensor)
    ]
    for owner, kind, name, shape, dtype in exchange.from_first(found):
        home = homes(modules[owner])[kind]
        is_first = dist.get_rank() == 0
        value = (
            home[name].detach().to(device).contiguous() if is_first else torch.empty(shape, dtype=dtype, device=device)
        )
        # As bytes: not every backend sends truth values.
        dist.broadcast(value.view(torch.uint8) if dtype == torch.bool else value, 0)
        home[name] = value
