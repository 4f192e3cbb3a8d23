"""The dtypes of the weights in a source's files, in which a trained model is saved too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from orchestrator.models.folder import weight_files
from orchestrator.models.source import SourceModel

# Names of safetensors. Other dtypes, such as fp64, are read and written as fp32.
_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredDtypes:
    """The dtype of each weight of a model."""

    main: torch.dtype = torch.float32
    """The dtype of most numbers, and of weights that the source does not have."""
    others: Mapping[str, torch.dtype] = field(default_factory=dict)
    """The dtypes of weights in another one, by name."""

    def of(self, name: str) -> torch.dtype:
        return self.others.get(name, self.main)


def stored_dtypes(source: SourceModel, config: Any, model: Any) -> StoredDtypes:
    """Return the dtypes of a source's weights, by their names in a model.

    They are read from local files, or else taken from the config.

    Args:
        config: the source's.
    """
    if not source.is_local:
        dtype = config.get_text_config().dtype
        return StoredDtypes(dtype if dtype in _HALF.values() else torch.float32)
    numbers: Counter[torch.dtype] = Counter()
    found: dict[str, torch.dtype] = {}
    for path in weight_files(Path(source.location)):
        with safe_open(path, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                found[name] = _HALF.get(part.get_dtype(), torch.float32)
                numbers[found[name]] += torch.Size(part.get_shape()).numel()
    (main, _), *_ = numbers.most_common(1)
    odd = {name: dtype for name, dtype in found.items() if dtype != main}
    return StoredDtypes(main, _by_names_in(model, odd) if odd else {})


def _by_names_in(model: Any, stored: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Return dtypes by a model's names, whose beginnings may differ from those in files.

    A weight in fp32 sets the dtype of those whose names have the longest common ending with its own: a wrong match only
    keeps more digits than needed. One in bf16 or fp16 does so only if the names are equal but for the body's prefix.
    """
    endings: dict[str, list[str]] = {}
    for name in model.state_dict(keep_vars=True):
        endings.setdefault(name.rpartition(".")[2], []).append(name)
    formats: dict[str, torch.dtype] = {}
    for name, dtype in stored.items():
        alike = endings.get(name.rpartition(".")[2], [])
        if dtype == torch.float32:
            most = max((_equal_parts(name, each) for each in alike), default=0)
            formats |= {each: dtype for each in alike if _equal_parts(name, each) == most}
        else:
            prefix = f"{model.base_model_prefix}."
            formats |= {each: dtype for each in alike if each.removeprefix(prefix) == name.removeprefix(prefix)}
    return formats


def _equal_parts(one: str, other: str) -> int:
    """Return how many parts of two dotted names are the same, from their ends."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
