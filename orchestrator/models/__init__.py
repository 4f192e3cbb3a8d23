"""Source models: find and load them safely, find their blocks, freeze them, add heads and adapters.

In this order: `find_source`, `load_tokenizer` (or `load_image_processor`) and `load_config`, `load_model`, `set_head`,
`find_blocks`, `freeze_blocks`, `add_adapter` (then `adapted_blocks`, for the new names of parameters).

Modules are imported when one of their names is used: finding a source needs no torch, whose import takes seconds.
"""

# ruff: noqa: F403
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.models.adapter import *
    from orchestrator.models.batch_norm import *
    from orchestrator.models.blocks import *
    from orchestrator.models.body import *
    from orchestrator.models.freeze import *
    from orchestrator.models.head import *
    from orchestrator.models.image_processor import *
    from orchestrator.models.length import *
    from orchestrator.models.load import *
    from orchestrator.models.low_rank import *
    from orchestrator.models.outline import *
    from orchestrator.models.quantize import *
    from orchestrator.models.shortcuts.fp32_compute import *
    from orchestrator.models.shortcuts.packed_sequences import *
    from orchestrator.models.shortcuts.prefix import *
    from orchestrator.models.shortcuts.prefix_extraction import *
    from orchestrator.models.shortcuts.token_loss import *
    from orchestrator.models.shortcuts.token_pooling import *
    from orchestrator.models.source import *
    from orchestrator.models.stored import *
else:
    _NAMES = {
        "adapter": "adapted_blocks add_adapter find_experts has_learned trained_modules",
        "batch_norm": "frozen_norms set_batch_norm_momentum",
        "blocks": "Block Blocks find_blocks",
        "body": "find_body",
        "freeze": "Frozen freeze_blocks resolve_depth",
        "head": "set_head write_deep_head_code",
        "image_processor": "ImagePreprocessor set_image_size",
        "length": "find_max_length num_layers_overrides",
        "load": "LoadedModel add_embeddings load_config load_image_processor load_model load_tokenizer seeded "
        "set_padding_token",
        "low_rank": "LoraDeltas extend_adapter init_pissa read_lora_deltas",
        "outline": "is_outline",
        "quantize": "check_quantization quantized_layers set_compute_dtype",
        "shortcuts.fp32_compute": "Fp32ComputeMode",
        "shortcuts.packed_sequences": "attend_within_sequences takes_packed_sequences",
        "shortcuts.prefix": "Prefix",
        "shortcuts.prefix_extraction": "PrefixUnavailable extract_prefix",
        "shortcuts.token_loss": "find_token_losses return_token_losses",
        "shortcuts.token_pooling": "TokenPooling find_token_pooling pool_in_last_layer",
        "source": "SourceModel find_source fingerprint open_folder",
        "stored": "StoredDtypes stored_dtypes",
    }
    _MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__} has no attribute {name}")
        found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return found
