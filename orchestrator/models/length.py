"""How many tokens a model holds, found by trying: some count positions from 2 on, and some hold more than they say.

A stand-in of the model, whose weights are zeros that take no memory, reads made-up texts. A few tokens show which
tables of positions it has, and one more than a table holds shows whether it limits the model. Shapes show the rest.
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
Rows: TypeAlias = dict[int, tuple[int, int]]
"""By the identity of an embedding table: its number of rows, and the last one that was read."""
# What models raise on inputs that do not fit.
_REFUSALS = (IndexError, RuntimeError, ValueError, AssertionError)


def find_max_length(config: Any, auto_class: str, wanted: int, trust_remote_code: bool = False) -> int | None:
    """Return how many tokens a model reads at most, where that is less than `wanted` or a table of positions says it.

    Args:
        config: the model's config, from `load_config`.
        wanted: a number of tokens.

    Returns:
        None where nothing limits it, and where the model cannot be tried with made-up texts.
    """
    # Some models draw numbers when they read.
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        return _find_held_length(config, auto_class, wanted, trust_remote_code)


def _find_held_length(config: Any, auto_class: str, wanted: int, trust_remote_code: bool) -> int | None:
    try:
        model = _stand_in(config, auto_class, trust_remote_code)
        rows = [_rows_read(model, config, length) for length in (FEW, MORE)]
    except (*_REFUSALS, KeyError, TypeError, AttributeError, ArithmeticError, NotImplementedError, ImportError):
        return None  # Whatever is wrong with it is told where it is loaded.
    longest = None
    for table, (size, last) in sorted(rows[0].items(), key=lambda item: item[1]):
        grows = rows[1].get(table, (size, last))[1] - last == MORE - FEW
        limit = size - last - 1 + FEW
        # The buckets of relative positions are read like positions, until they are used up.
        if grows and not _reads(model, config, limit + 1):
            longest = limit
            break
    model.to("meta")
    low, high = FEW, min(wanted, longest or wanted)
    # Without values some models read nothing.
    if not _reads(model, config, low) or _reads(model, config, high):
        return longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _reads(model, config, middle) else (low, middle)
    return low


def num_layers_overrides(config: Any, number: int) -> dict[str, Any] | None:
    """What makes a config's model have so many layers; None where that is not known."""
    text = config.get_text_config()
    if text is not config or not isinstance(getattr(config, "num_hidden_layers", None), int):
        return None
    if getattr(config, "is_encoder_decoder", False):
        return None
    values = config.to_dict()
    each = [key for key in values if "layer" in key and isinstance(values[key], list)]
    lists = {key: values[key][:number] for key in each if len(values[key]) == config.num_hidden_layers}
    return {"num_hidden_layers": number, **lists}


def _stand_in(config: Any, auto_class: str, trust_remote_code: bool) -> Any:
    """Return a model of the fewest layers whose parameters are zeros without memory of their own."""
    changes = num_layers_overrides(config, 1) or {key: 1 for key in _NUMBERS_OF_LAYERS if hasattr(config, key)}
    values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    try:
        config = type(config).from_dict({**values, **changes})
    except (StrictDataclassError, NotImplementedError):  # Other values of it belong to so many layers.
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
    # The output layer of a language model is large, and reads as many tokens as come.
    return (model if getattr(config, "is_encoder_decoder", False) else model.base_model).eval()


class _WithoutProducts(TorchFunctionMode):
    """Note which rows of embedding tables are read, and spare linear functions and attention, which cost most."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Rows = {}

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


def _rows_read(model: Any, config: Any, length: int) -> Rows:
    """Return which rows of its embedding tables a model reads for a text of so many tokens."""
    mode = _WithoutProducts()
    with mode, torch.no_grad():
        model(input_ids=_text(config, length).to(model.device))
    return mode.rows


def _reads(model: Any, config: Any, length: int) -> bool:
    """Whether a text of so many tokens passes through the model."""
    with contextlib.suppress(*_REFUSALS):
        _rows_read(model, config, length)
        return True
    return False


def _text(config: Any, length: int) -> Tensor:
    """Return token ids of shape [1, length]: one ordinary token, and an end, which some heads look for."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id")
    special = [getattr(config, name, None) for name in names]
    ids = torch.full((1, length), next(token for token in range(len(names) + 1) if token not in special))
    end = getattr(config, "eos_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and isinstance(end, int):
        ids[0, -1] = end
    return ids
