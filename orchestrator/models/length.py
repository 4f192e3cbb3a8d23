"""Find the maximum input length of a model by trial: some count positions from 2, some accept more than they state.

A model of the same class, whose weights are zeros without memory, reads generated token ids. A few tokens show which
tables of positions it has, and an input longer than a table shows whether the table limits the model. Otherwise the
limit is found with tensors that have only shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from orchestrator.models.load import quiet_transformers

FEW, MORE = 4, 6
# Of models with an encoder and a decoder.
_NUMBERS_OF_LAYERS = ("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers")
# Values of configs that are lists with one entry per layer.
_PER_LAYER = frozenset(
    {
        "attention_layers",
        "attn_layers",
        "layer_rope_theta",
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "no_rope_layers",
        "num_attention_heads_per_layer",
        "num_key_value_heads_per_layer",
    }
)
EmbeddingReads: TypeAlias = dict[int, tuple[int, int]]
"""By the id of an embedding table: its number of rows, and the last row that was read."""
# Raised by models whose inputs are too long.
_TOO_LONG = (IndexError, RuntimeError, ValueError, AssertionError)


def find_max_length(config: Any, auto_class: str, wanted: int, trust_remote_code: bool = False) -> int | None:
    """Return the maximum number of tokens that a model reads, if that is less than `wanted` or set by a table.

    Args:
        config: the model's config, from `load_config`.
        wanted: a number of tokens.

    Returns:
        None if nothing limits it, or if the model cannot read generated token ids.
    """
    # Some models draw random numbers in their forward pass.
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        return _find_held_length(config, auto_class, wanted, trust_remote_code)


def _find_held_length(config: Any, auto_class: str, wanted: int, trust_remote_code: bool) -> int | None:
    try:
        model = _build_zero_model(config, auto_class, trust_remote_code)
        rows = [_rows_read(model, config, length) for length in (FEW, MORE)]
    except (*_TOO_LONG, KeyError, TypeError, AttributeError, ArithmeticError, NotImplementedError, ImportError):
        return None  # Loading the model reports what is wrong with it.
    longest = None
    for table, (size, last) in sorted(rows[0].items(), key=lambda item: item[1]):
        grows = rows[1].get(table, (size, last))[1] - last == MORE - FEW
        limit = size - last - 1 + FEW
        # Buckets of relative positions are read like positions, up to the last bucket.
        if grows and not _reads(model, config, limit + 1):
            longest = limit
            break
    model.to("meta")
    low, high = FEW, min(wanted, longest or wanted)
    # Some models cannot run without values.
    if not _reads(model, config, low) or _reads(model, config, high):
        return longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _reads(model, config, middle) else (low, middle)
    return low


def num_layers_overrides(config: Any, number: int) -> dict[str, Any] | None:
    """Return the values of a config that give its model this number of layers; None if they are not known."""
    text = config.get_text_config()
    if text is not config or not isinstance(getattr(config, "num_hidden_layers", None), int):
        return None
    if getattr(config, "is_encoder_decoder", False):
        return None
    values = config.to_dict()
    lists = {key: value for key, value in values.items() if key in _PER_LAYER and isinstance(value, list)}
    cut = {key: value[:number] for key, value in lists.items() if len(value) == config.num_hidden_layers}
    return {"num_hidden_layers": number, **cut}


def _build_zero_model(config: Any, auto_class: str, trust_remote_code: bool) -> Any:
    """Return a model of one layer, where that is possible, whose parameters are zeros without memory."""
    changes = num_layers_overrides(config, 1) or {key: 1 for key in _NUMBERS_OF_LAYERS if hasattr(config, key)}
    values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    try:
        config = type(config).from_dict({**values, **changes})
    except (StrictDataclassError, NotImplementedError):  # Other values depend on the number of layers.
        config = type(config).from_dict(values)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, auto_class).from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code, experts_implementation="eager"
        )
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=value.dtype).expand(value.shape)
            module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    # The output layer of a language model is large, and accepts any number of tokens.
    return (model if getattr(config, "is_encoder_decoder", False) else model.base_model).eval()


class _SkipProducts(TorchFunctionMode):
    """Record which rows of embedding tables are read; skip linear functions and attention, which cost most."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: EmbeddingReads = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.embedding:
            self._note(*args, **(kwargs or {}))
        elif func is functional.linear:
            func = _zeros_of_linear
        elif func is functional.scaled_dot_product_attention:
            func = _zeros_of_attention
        return func(*args, **(kwargs or {}))

    def _note(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
        if not input.is_meta:
            self.rows[id(weight)] = (len(weight), int(input.max()))


def _zeros_of_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_zeros(*input.shape[:-1], len(weight))


def _zeros_of_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_zeros(*query.shape[:-1], value.shape[-1])


def _rows_read(model: Any, config: Any, length: int) -> EmbeddingReads:
    """Return which rows of its embedding tables a model reads for this number of tokens."""
    mode = _SkipProducts()
    with mode, torch.no_grad():
        model(input_ids=_token_ids(config, length).to(model.device))
    return mode.rows


def _reads(model: Any, config: Any, length: int) -> bool:
    """Whether the model reads this number of tokens."""
    with contextlib.suppress(*_TOO_LONG):
        _rows_read(model, config, length)
        return True
    return False


def _token_ids(config: Any, length: int) -> Tensor:
    """Return token ids of shape [1, length]: an ordinary token, and the end token, which some heads look for."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id")
    special = [getattr(config, name, None) for name in names]
    ids = torch.full((1, length), next(token for token in range(len(names) + 1) if token not in special))
    end = getattr(config, "eos_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and isinstance(end, int):
        ids[0, -1] = end
    return ids
