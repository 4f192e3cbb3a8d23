"""Tiny models of many architectures, built from configs: two or more layers, random weights, nothing downloaded."""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 40
EXAMPLE = {"input_ids": torch.tensor([[1, 2, 3, 1]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
LABELS = {"num_labels": 3, "pad_token_id": 0}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    **LABELS,
}
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 8}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", ENCODER),
    "roberta": ("RobertaConfig", ENCODER),
    "mpnet": ("MPNetConfig", ENCODER),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, **LABELS},
    ),
    "electra": ("ElectraConfig", {**ENCODER, "embedding_size": 8}),
    "deberta": (
        "DebertaV2Config",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm"},
    ),
    "deberta-with-convolution": (
        "DebertaV2Config",
        {**ENCODER, "relative_attention": True, "position_buckets": 8, "conv_kernel_size": 3, "conv_act": "gelu"},
    ),
    "deberta-first-version": ("DebertaConfig", {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "albert": ("AlbertConfig", {**ENCODER, "embedding_size": 8, "hidden_dropout_prob": 0.1}),
    "modernbert": (
        "ModernBertConfig",
        {**ENCODER, "embedding_dropout": 0.1, "mlp_dropout": 0.1, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "xlm": (
        "XLMConfig",
        {"vocab_size": VOCABULARY, "emb_dim": 16, "n_layers": 3, "n_heads": 2, "pad_index": 0, **LABELS},
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, **LABELS},
    ),
    "llama": ("LlamaConfig", DECODER),
    "qwen2": ("Qwen2Config", DECODER),
    "qwen3": ("Qwen3Config", DECODER),
    "mistral": ("MistralConfig", DECODER),
    "t5": (
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
            **LABELS,
        },
    ),
    "bart": (
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 32,
            "encoder_layerdrop": 0.3,
            "pad_token_id": 0,
            "eos_token_id": 3,
            "num_labels": 3,
        },
    ),
}
# Its layers are called without hooks, and are not linear.
SQUEEZEBERT = {"squeezebert": ("SqueezeBertConfig", {**ENCODER, "embedding_size": 16})}
# What some shortcuts cannot be used with.
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    # Its layers have positions before examples, and its head reads the last position, padded or not.
    "xlnet": (
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 32, **LABELS},
    ),
    # Its layers read texts that are padded to whole windows.
    "longformer": ("LongformerConfig", {**ENCODER, "attention_window": [4, 4, 4], "sep_token_id": 2}),
    # A setting with "dropout" in its name is a flag.
    "esm": ("EsmConfig", {**ENCODER, "mask_token_id": 2}),
}
NUM_LAYERS = {"albert": 1, "t5": 4, "bart": 4}  # the others have 3


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny sequence classifier with random weights."""
    config_name, values = {**CONFIGS, **SQUEEZEBERT, **ODD}[name]
    config = getattr(transformers, config_name)(**{**values, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForSequenceClassification.from_config(config)


def num_layers(name: str) -> int:
    return NUM_LAYERS.get(name, 3)


def save_tokenizer(folder: Path, **special: str) -> None:
    """A tokenizer of one token a word, as large as the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
