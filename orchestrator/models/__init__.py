"""Source models: find and load them safely, tell their blocks apart, freeze, give them heads and adapters.

In this order: `find_source`, `load_tokenizer` and `load_config`, `load_model`, `fit_to_tokenizer`, `set_head`,
`find_blocks`, `freeze_blocks`, `add_adapter` (and `adapted_blocks`, for the names after it).
"""

from orchestrator.models.adapter import adapted_blocks, add_adapter
from orchestrator.models.blocks import Block, Blocks, find_blocks
from orchestrator.models.freeze import Depth, Frozen, freeze_blocks, resolve_depth
from orchestrator.models.head import set_head, write_deep_head_code
from orchestrator.models.load import LoadedModel, fit_to_tokenizer, load_config, load_model, load_tokenizer, seeded
from orchestrator.models.source import SourceModel, find_source, fingerprint, open_folder

__all__ = [
    "Block",
    "Blocks",
    "Depth",
    "Frozen",
    "LoadedModel",
    "SourceModel",
    "adapted_blocks",
    "add_adapter",
    "find_blocks",
    "find_source",
    "fingerprint",
    "fit_to_tokenizer",
    "freeze_blocks",
    "load_config",
    "load_model",
    "load_tokenizer",
    "open_folder",
    "resolve_depth",
    "seeded",
    "set_head",
    "write_deep_head_code",
]
