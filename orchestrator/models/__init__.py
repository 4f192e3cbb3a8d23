"""Source models: find and load them safely, tell their blocks apart, freeze, give them heads and adapters.

In this order: `find_source`, `load_tokenizer` (or `load_image_processor`) and `load_config`, `load_model`,
`fit_to_tokenizer`, `set_head`, `find_blocks`, `freeze_blocks`, `add_adapter` (and `adapted_blocks`,
for the names after it).

Each is imported when it is asked for: finding a source takes no time, and its model needs torch, which takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.models.adapter import adapted_blocks, add_adapter, find_experts, has_learned, trained_parts
    from orchestrator.models.batch_norm import fit_momentum, untuned_norms
    from orchestrator.models.blocks import Block, Blocks, find_blocks
    from orchestrator.models.body import find_body
    from orchestrator.models.freeze import Depth, Frozen, freeze_blocks, resolve_depth
    from orchestrator.models.head import set_head, write_deep_head_code
    from orchestrator.models.image_processor import PictureMaker, set_image_size
    from orchestrator.models.length import held_length, layer_changes
    from orchestrator.models.load import (
        LoadedModel,
        add_embeddings,
        fit_to_tokenizer,
        load_config,
        load_image_processor,
        load_model,
        load_tokenizer,
        seeded,
    )
    from orchestrator.models.low_rank import Changes, begin_with_principal_parts, extend_adapter, read_changes
    from orchestrator.models.outline import is_outline
    from orchestrator.models.quantize import check_quantization, quantized_layers, set_compute_dtype
    from orchestrator.models.shortcuts.fp32_compute import ComputesInFp32
    from orchestrator.models.shortcuts.packed_sequences import attend_within_texts, takes_texts_in_a_row
    from orchestrator.models.shortcuts.prefix import Prefix
    from orchestrator.models.shortcuts.split import Unsplit, split_model
    from orchestrator.models.shortcuts.token_loss import answer_with_losses, losses_of
    from orchestrator.models.shortcuts.token_pooling import Pick, find_pick, pick_in_last_layer
    from orchestrator.models.source import SourceModel, find_source, fingerprint, open_folder
    from orchestrator.models.stored import StoredFormats, stored_formats

__all__ = [
    "Block",
    "Blocks",
    "Changes",
    "ComputesInFp32",
    "Depth",
    "Frozen",
    "LoadedModel",
    "Pick",
    "PictureMaker",
    "Prefix",
    "SourceModel",
    "StoredFormats",
    "Unsplit",
    "adapted_blocks",
    "add_adapter",
    "add_embeddings",
    "answer_with_losses",
    "attend_within_texts",
    "begin_with_principal_parts",
    "check_quantization",
    "extend_adapter",
    "find_blocks",
    "find_body",
    "find_experts",
    "find_pick",
    "find_source",
    "fingerprint",
    "fit_momentum",
    "fit_to_tokenizer",
    "freeze_blocks",
    "has_learned",
    "held_length",
    "is_outline",
    "layer_changes",
    "load_config",
    "load_image_processor",
    "load_model",
    "load_tokenizer",
    "losses_of",
    "open_folder",
    "pick_in_last_layer",
    "quantized_layers",
    "read_changes",
    "resolve_depth",
    "seeded",
    "set_compute_dtype",
    "set_head",
    "set_image_size",
    "split_model",
    "stored_formats",
    "takes_texts_in_a_row",
    "trained_parts",
    "untuned_norms",
    "write_deep_head_code",
]
_HOMES = {
    "adapter": (
        "adapted_blocks",
        "add_adapter",
        "find_experts",
        "has_learned",
        "trained_parts",
    ),
    "batch_norm": (
        "fit_momentum",
        "untuned_norms",
    ),
    "blocks": (
        "Block",
        "Blocks",
        "find_blocks",
    ),
    "body": ("find_body",),
    "freeze": (
        "Depth",
        "Frozen",
        "freeze_blocks",
        "resolve_depth",
    ),
    "head": (
        "set_head",
        "write_deep_head_code",
    ),
    "image_processor": (
        "PictureMaker",
        "set_image_size",
    ),
    "length": (
        "held_length",
        "layer_changes",
    ),
    "load": (
        "LoadedModel",
        "add_embeddings",
        "fit_to_tokenizer",
        "load_config",
        "load_image_processor",
        "load_model",
        "load_tokenizer",
        "seeded",
    ),
    "low_rank": (
        "Changes",
        "begin_with_principal_parts",
        "extend_adapter",
        "read_changes",
    ),
    "outline": ("is_outline",),
    "shortcuts.token_pooling": (
        "Pick",
        "find_pick",
        "pick_in_last_layer",
    ),
    "shortcuts.prefix": ("Prefix",),
    "quantize": (
        "check_quantization",
        "quantized_layers",
        "set_compute_dtype",
    ),
    "source": (
        "SourceModel",
        "find_source",
        "fingerprint",
        "open_folder",
    ),
    "shortcuts.split": (
        "Unsplit",
        "split_model",
    ),
    "stored": (
        "StoredFormats",
        "stored_formats",
    ),
    "shortcuts.packed_sequences": (
        "attend_within_texts",
        "takes_texts_in_a_row",
    ),
    "shortcuts.token_loss": (
        "answer_with_losses",
        "losses_of",
    ),
    "shortcuts.fp32_compute": ("ComputesInFp32",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            found = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return found
    raise AttributeError(f"module {__name__} has no {name}")
