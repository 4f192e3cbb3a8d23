"""How many tokens a model holds, against what it does with one more."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor, nn

from orchestrator.models import find_max_length


class TableConfig(transformers.PreTrainedConfig):  # type: ignore[misc]
    model_type = "test-table"


class Table(transformers.PreTrainedModel):  # type: ignore[misc]
    """A model whose positions are a parameter, not an embedding."""

    config_class = TableConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.words = nn.Embedding(40, 4)
        self.positions = nn.Parameter(torch.zeros(66, 4))
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.words(input_ids) + self.positions[: input_ids.shape[1]]
        return found


SMALL = {**tiny_models.ENCODER, "max_position_embeddings": 66, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
WIDE = {"vocab_size": 40, "d_model": 16, "max_position_embeddings": 66, "pad_token_id": 1, "eos_token_id": 2}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
WIDTHS = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SEQUENCE_TO_SEQUENCE = {**WIDE, **LAYERS, **WIDTHS, "num_labels": 3}
TEXT, WRITES = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
# Each with its auto class, and the number of tokens that it holds; None where nothing limits it.
FAMILIES: dict[str, tuple[dict[str, Any], str, int | None]] = {
    "BertConfig": (SMALL, TEXT, 66),
    "RobertaConfig": (SMALL, TEXT, 64),
    "XLMRobertaConfig": (SMALL, TEXT, 64),
    "XLMRobertaXLConfig": (SMALL, TEXT, 64),
    "CamembertConfig": (SMALL, TEXT, 64),
    "RobertaPreLayerNormConfig": (SMALL, TEXT, 64),
    "Data2VecTextConfig": (SMALL, TEXT, 64),
    "XmodConfig": ({**SMALL, "default_language": "en_XX"}, TEXT, 64),
    "IBertConfig": (SMALL, TEXT, 64),
    "MPNetConfig": (SMALL, TEXT, 64),
    "LongformerConfig": ({**SMALL, "attention_window": 4}, TEXT, 64),
    "EsmConfig": ({**SMALL, "position_embedding_type": "absolute", "mask_token_id": 3}, TEXT, 64),
    "DistilBertConfig": (
        {
            "vocab_size": 40,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 32,
            "max_position_embeddings": 66,
            "num_labels": 3,
        },
        TEXT,
        66,
    ),
    "ElectraConfig": ({**SMALL, "embedding_size": 8}, TEXT, 66),
    "MBartConfig": (SEQUENCE_TO_SEQUENCE, TEXT, 66),
    "BartConfig": (SEQUENCE_TO_SEQUENCE, TEXT, 66),
    "T5Config": ({**tiny_models.CONFIGS["t5"][1], "pad_token_id": 0}, TEXT, None),
    "DebertaV2Config": ({**tiny_models.CONFIGS["deberta"][1], "position_biased_input": False}, TEXT, None),
    "LlamaConfig": (tiny_models.DECODER, TEXT, None),
    "GPT2Config": (
        {**tiny_models.CONFIGS["gpt2"][1], "n_positions": 66, "eos_token_id": 2, "bos_token_id": 0},
        TEXT,
        66,
    ),
    "NystromformerConfig": ({**SMALL, "segment_means_seq_len": 66, "num_landmarks": 66}, TEXT, 66),
    "FNetConfig": ({**SMALL, "tpu_short_seq_length": 66}, TEXT, 66),
    "BigBirdConfig": (SMALL, TEXT, 66),
    "OPTConfig": ({**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16}, WRITES, 66),
    "XLMRobertaConfig ": ({**SMALL, "is_decoder": True}, WRITES, 64),
    "BioGptConfig": (SMALL, WRITES, 66),
    "BloomConfig": ({"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2}, WRITES, None),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_holds_as_many_tokens_as_is_said_and_not_one_more(name: str) -> None:
    values, auto_class, expected = FAMILIES[name]
    config = getattr(transformers, name.strip())(**values)
    assert find_max_length(config, auto_class, 300) == expected
    model = getattr(transformers, auto_class).from_config(config).eval()

    def read(length: int) -> None:
        ids = torch.full((1, length), 5)
        ids[0, -1] = config.eos_token_id or 5
        with torch.no_grad():
            model(input_ids=ids)

    read(expected or 300)
    if expected is not None:
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            read(expected + 1)


def test_a_table_of_positions_that_is_no_embedding_is_found_by_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    class Auto:
        @staticmethod
        def from_config(config: Any, **_: Any) -> Any:
            return Table(config)

    monkeypatch.setattr(transformers, TEXT, Auto)
    assert find_max_length(TableConfig(), TEXT, 300) == 66
    assert find_max_length(TableConfig(), TEXT, 66) is None
