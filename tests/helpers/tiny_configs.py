"""Tiny configs of any architecture of transformers: its default config, with each size made small by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 64
PICTURE = 64
"""Height and width of pictures, in pixels."""

# Values by the names that configs give them; a size that is smaller by default stays as it is.
NAMES = {
    32: """
        hidden_size d_model n_embd emb_dim embedding_size embedding_dim dim word_embed_proj_dim input_embedding_size
        output_embedding_size projection_dim projection_size d_latents lru_width attention_hidden_size
        hidden_size_global backbone_hidden_size out_hidden_size embed_dim pooler_output_size prediction_head_size
        intermediate_size d_ff dff dim_ff d_inner ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size hidden_dim
        mlp_dim feed_forward_size moe_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size
        expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size adapter_in_dim adapter_out_dim
        adapter_input_size ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels output_channels
        class_expand max_2d_position_embeddings
    """,
    4: """
        num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads num_self_attention_heads num_cross_attention_heads
        swa_num_attention_heads linear_num_heads linear_num_value_heads index_n_heads mamba_n_heads n_mamba_heads
        mamba_num_heads num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num window_size
        index_topk
    """,
    2: """
        num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads num_hidden_layers
        n_layer n_layers num_layers num_encoder_layers num_decoder_layers encoder_layers decoder_layers num_blocks
        num_layers_per_stack num_global_layers depth num_self_attends_per_block conf_num_hidden_layers
        num_experts_per_tok moe_topk moe_top_k moe_k n_group topk_group upsample_groups index_block_size
        index_topk_blocks
    """,
    8: """
        head_dim d_head d_kv dim_head kv_channels swa_head_dim global_head_dim linear_key_head_dim
        linear_value_head_dim linear_head_dim attention_head_dim attention_head_size qk_nope_head_dim qk_rope_head_dim
        v_head_dim index_head_dim kv_lora_rank q_lora_rank o_lora_rank rotary_dim query_pre_attn_scalar mamba_head_dim
        mamba_d_head sliding_window sliding_window_size attention_window_size local_attention
        hidden_size_per_layer_input
    """,
    64: """
        max_position_embeddings n_positions n_ctx context_length max_seq_len max_source_positions max_target_positions
        image_size
    """,
    16: """
        patch_size encoder_hash_byte_group_vocab num_hash_buckets max_xpath_tag_unit_embeddings
        max_xpath_subs_unit_embeddings
    """,
    0.25: "depth_multiplier scale",
    0: "num_kv_shared_layers",
}
# Values in lists with an entry for each stage.
NAMES_IN_STAGES = {
    1: "depths block_sizes stage_num_blocks num_block_repeats n_attn_blocks",
    2: "num_heads num_attention_heads mlp_ratio mlp_ratios stage_numb_of_layers expand_ratios",
    16: """
        hidden_sizes embed_dim embed_dims neck_hidden_sizes stage_in_channels stage_mid_channels stage_out_channels
        base_attn_unit_dims in_channels out_channels patch_size
    """,
    64: "image_size",
}
SMALL = {name: value for value, names in NAMES.items() for name in names.split()}
SMALL_IN_STAGES = {name: value for value, names in NAMES_IN_STAGES.items() for name in names.split()}
# Derived from large sizes, or missing, where they are not given.
NEEDED = ("num_key_value_heads", "head_dim", "num_experts_per_tok", "n_routed_experts")
EACH_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
SPECIAL = {"pad": 0, "bos": 1, "cls": 1, "eos": 2, "sep": 2, "decoder_start": 2, "unk": 3, "mask": 4}
OTHER_TOKENS = 5

QUERIES = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 16,
    "split_ngram_parts": 2,
}
# What the names do not tell.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "bit": {"num_groups": 4},
    "blt": {"use_cache": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cvt": {"mlp_ratio": (2.0, 2.0, 2.0)},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "donut-swin": {"depths": [1, 1], "num_heads": [2, 2]},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "efficientnet": {
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "hidden_dim": 1280,
        "in_channels": (32, *[16] * 6),
    },
    "emu3": {"vocabulary_map": {"<|extra_200|>": 5, "<image>": 6, "<|visual token 000000|>": 7}},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "hgnet_v2": {"stem_channels": (3, 16, 16)},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "markuplm": {"max_depth": 4, "tag_pad_id": 15, "subs_pad_id": 15},
    "nemotron_h": {"n_groups": 2},
    "perceiver": {"image_size": 64},
    "qwen4_exp_text": QUERIES,
    "qwen4_exp": {"text_config": QUERIES},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "attn_layers": ("local", "lsh"),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "swin": {"depths": [1, 1], "num_heads": [2, 2]},
    "t5": {"decoder_start_token_id": 0},
    "textnet": {"stem_out_channels": 16},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def tiny_config(model_type: str) -> Any:
    """Return a config of this type, small enough for a model of it to train in a moment."""
    return shrink(CONFIG_MAPPING[model_type], CHANGES.get(model_type, {}))


def shrink(config_class: type[Any], changes: dict[str, Any]) -> Any:
    """Return the class's default config with small sizes, also in the configs inside; `changes` come last."""
    try:
        default = config_class()
    except StrictDataclassError:  # It has no default that it allows.
        default = config_class(**changes)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        value = vars(default).get(config_class.attribute_map.get(field.name, field.name))
        if isinstance(value, PreTrainedConfig):
            values[field.name] = shrink(type(value), changes.get(field.name, {}))
        elif (_is_given(field) or field.name in NEEDED) and (small := _shrink_value(field.name, value)) != value:
            values[field.name] = small
    if "kv_lora_rank" in values:  # Latent attention has keys for each head.
        values["num_key_value_heads"] = values["num_attention_heads"]
    others = {name: value for name, value in changes.items() if not isinstance(values.get(name), PreTrainedConfig)}
    return config_class(**{**values, **_one_layer_of_each_kind(vars(default)), **others})


def _is_given(field: Any) -> bool:
    """Whether the class has a value of its own for it; otherwise it is derived from others."""
    return field.default_factory is not dataclasses.MISSING or field.default not in (None, dataclasses.MISSING)


def _shrink_value(name: str, value: Any) -> Any:
    if name == "vocab_size_per_layer_input" or name.endswith("vocab_size"):
        return VOCABULARY
    if name.endswith(("token_id", "token_index")) and isinstance(value, int | list):
        return SPECIAL.get(name.removesuffix("_token_id"), OTHER_TOKENS)
    if isinstance(value, list | tuple) and name in SMALL_IN_STAGES:
        return _shrink_stages(value, SMALL_IN_STAGES[name])
    if isinstance(value, bool | list | tuple | dict | str) or name not in SMALL:
        return value
    return SMALL[name] if value is None else min(value, SMALL[name])


def _shrink_stages(values: Sequence[Any], small: float) -> Any:
    return type(values)(min(value, small) if isinstance(value, int | float) else value for value in values)


def _one_layer_of_each_kind(values: dict[str, Any]) -> dict[str, Any]:
    lists = {name: values[name] for name in EACH_LAYER if values.get(name)}
    if not lists or "num_hidden_layers" not in values:
        return {}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=False)))
    kinds = kinds if len(kinds) > 1 else kinds * 2
    found: dict[str, Any] = {name: [kind[place] for kind in kinds] for place, name in enumerate(lists)}
    return {**found, "num_hidden_layers": len(kinds)}
