"""Source models: find and load them safely, tell their blocks apart, freeze, give them heads and adapters.

In this order: `find_source`, `load_tokenizer` (or `load_image_processor`) and `load_config`, `load_model`,
`fit_to_tokenizer`, `set_head`, `find_blocks`, `freeze_blocks`, `add_adapter` (and `adapted_blocks`,
for the names after it).

Each is imported when it is asked for: finding a source takes no time, and its model needs torch, which takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.models.adapter import adapted_blocks, add_adapter, find_experts, has_learned, trained_modules
    from orchestrator.models.batch_norm import frozen_norms, set_batch_norm_momentum
    from orchestrator.models.blocks import Block, Blocks, find_blocks
    from orchestrator.models.body import find_body
    from orchestrator.models.freeze import Depth, Frozen, freeze_blocks, resolve_depth
    from orchestrator.models.head import set_head, write_deep_head_code
    from orchestrator.models.image_processor import ImagePreprocessor, set_image_size
    from orchestrator.models.length import find_max_length, num_layers_overrides
    from orchestrator.models.load import (
        LoadedModel,
        add_embeddings,
        load_config,
        load_image_processor,
        load_model,
        load_tokenizer,
        seeded,
        set_padding_token,
    )
    from orchestrator.models.low_rank import LoraDeltas, extend_adapter, init_pissa, read_lora_deltas
    from orchestrator.models.outline import is_outline
    from orchestrator.models.quantize import check_quantization, quantized_layers, set_compute_dtype
    from orchestrator.models.shortcuts.fp32_compute import Fp32ComputeMode
    from orchestrator.models.shortcuts.packed_sequences import attend_within_sequences, takes_packed_sequences
    from orchestrator.models.shortcuts.prefix import Prefix
    from orchestrator.models.shortcuts.prefix_extraction import PrefixUnavailable, extract_prefix
    from orchestrator.models.shortcuts.token_loss import find_token_losses, return_token_losses
    from orchestrator.models.shortcuts.token_pooling import TokenPooling, find_token_pooling, pool_in_last_layer
    from orchestrator.models.source import SourceModel, find_source, fingerprint, open_folder
    from orchestrator.models.stored import StoredDtypes, stored_dtypes

__all__ = [
    "Block",
    "Blocks",
    "Depth",
    "Fp32ComputeMode",
    "Frozen",
    "ImagePreprocessor",
    "LoadedModel",
    "LoraDeltas",
    "Prefix",
    "PrefixUnavailable",
    "SourceModel",
    "StoredDtypes",
    "TokenPooling",
    "adapted_blocks",
    "add_adapter",
    "add_embeddings",
    "attend_within_sequences",
    "check_quantization",
    "extend_adapter",
    "extract_prefix",
    "find_blocks",
    "find_body",
    "find_experts",
    "find_max_length",
    "find_source",
    "find_token_losses",
    "find_token_pooling",
    "fingerprint",
    "freeze_blocks",
    "frozen_norms",
    "has_learned",
    "init_pissa",
    "is_outline",
    "load_config",
    "load_image_processor",
    "load_model",
    "load_tokenizer",
    "num_layers_overrides",
    "open_folder",
    "pool_in_last_layer",
    "quantized_layers",
    "read_lora_deltas",
    "resolve_depth",
    "return_token_losses",
    "seeded",
    "set_batch_norm_momentum",
    "set_compute_dtype",
    "set_head",
    "set_image_size",
    "set_padding_token",
    "stored_dtypes",
    "takes_packed_sequences",
    "trained_modules",
    "write_deep_head_code",
]
_HOMES = {
    "adapter": (
        "adapted_blocks",
        "add_adapter",
        "find_experts",
        "has_learned",
        "trained_modules",
    ),
    "batch_norm": (
        "set_batch_norm_momentum",
        "frozen_norms",
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
        "ImagePreprocessor",
        "set_image_size",
    ),
    "length": (
        "find_max_length",
        "num_layers_overrides",
    ),
    "load": (
        "LoadedModel",
        "add_embeddings",
        "set_padding_token",
        "load_config",
        "load_image_processor",
        "load_model",
        "load_tokenizer",
        "seeded",
    ),
    "low_rank": (
        "LoraDeltas",
        "init_pissa",
        "extend_adapter",
        "read_lora_deltas",
    ),
    "outline": ("is_outline",),
    "shortcuts.token_pooling": (
        "TokenPooling",
        "find_token_pooling",
        "pool_in_last_layer",
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
    "shortcuts.prefix_extraction": (
        "PrefixUnavailable",
        "extract_prefix",
    ),
    "stored": (
        "StoredDtypes",
        "stored_dtypes",
    ),
    "shortcuts.packed_sequences": (
        "attend_within_sequences",
        "takes_packed_sequences",
    ),
    "shortcuts.token_loss": (
        "return_token_losses",
        "find_token_losses",
    ),
    "shortcuts.fp32_compute": ("Fp32ComputeMode",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            found = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return found
    raise AttributeError(f"module {__name__} has no {name}")
