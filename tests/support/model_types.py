"""Tiny random checkpoints of every MoE model type of transformers, written by transformers itself.

A config is transformers' default for the type, with its sizes replaced by small ones: ``SIZES`` by key, ``CHOSEN`` where a type
needs more. The kinds of layers that the default has are kept, one or two of each.
"""

import shutil
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

LAYERS = 4
EXPERTS_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
CHOICES_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_SIZES = (
    *("shared_expert_intermediate_size", "shared_experts_intermediate_size", "shared_intermediate_size"),
    *("moe_shared_expert_intermediate_size", "share_expert_dim"),
)
SIZES: dict[str, Any] = {
    **dict.fromkeys(EXPERTS_KEYS, 8),
    **dict.fromkeys(CHOICES_KEYS, 2),
    **dict.fromkeys(SHARED_KEYS, 1),
    **dict.fromkeys(SHARED_SIZES, 48),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "pad_token_id"), 0),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **{"topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "sliding_window": 8, "max_position_embeddings": 512},
    **{"vocab_size": tiny.VOCABULARY, "vocab_size_per_layer_input": tiny.VOCABULARY, "hidden_size": 64, "intermediate_size": 96},
    **{"moe_intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 16, "kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    # Many small heads: with few, the indexer's scores are often equal (0), and rounding decides which token it keeps.
    **{"index_topk": 6, "index_head_dim": 16, "index_n_heads": 16, "hidden_size_per_layer_input": 16},
    **{"o_groups": 2, "o_lora_rank": 16, "gated_norm_rank": 8, "linear_head_dim": 16, "linear_num_heads": 4},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2, "mamba_chunk_size": 8},
    **{"mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_n_groups": 1, "ssm_state_size": 8, "n_groups": 2},
    **{"bos_token_id": 0, "eos_token_id": 1},
}
# The parts for images and sound are as small as possible.
TOWERS = ("vision_config", "audio_config")
TOWER_SIZES: dict[str, Any] = {
    **dict.fromkeys(("depth", "num_hidden_layers", "num_layers", "encoder_layers"), 1),
    **dict.fromkeys(("mlp_dim", "output_channels", "projector_input_dim", "projector_output_dim", "vision_output_dim"), 32),
    **{"global_attn_indexes": [0], "downsample_channels": [32, 32], "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY},
    **dict.fromkeys(("hidden_size", "embed_dim", "intermediate_size", "d_model", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("num_heads", "num_attention_heads", "encoder_attention_heads"), 2),
    **{"out_hidden_size": 64, "text_hidden_size": 64, "projection_dim": 64, "image_size": 28, "deepstack_visual_indexes": [0]},
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INKLING = {
    **{"unpadded_vocab_size": tiny.VOCABULARY, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    **{"sliding_window_size": 8, "d_rel": 8, "rel_extent": 16},
}
DEEPSEEK_V4 = ("compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention")
CHOSEN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **{"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "topk_method": "group_limited_greedy"},
        **{"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v4": {
        **{"layer_types": ["sliding_attention", *DEEPSEEK_V4], "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
        **{
            "compress_rates": dict(zip(DEEPSEEK_V4, (4, 16, 4), strict=True)),
            "num_key_value_heads": 1,
            "partial_rotary_factor": 0.5,
        },
    },
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        **{"head_dim": 24, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 32},
        **{"swa_kv_lora_rank": 16, "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 8},
    },
    "ernie4_5_vl_moe_text": {
        **{"moe_intermediate_size": [32, 32], "rope_parameters": {**PLAIN_ROPE, "mrope_section": [3, 3, 2]}},
    },
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32, "per_layer_config": {}},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 64},
    "dots3_note_vision_encoder": {
        "per_layer_config": {},
        "mlp_layer_types": ["dense"],
        "adapter_in_dim": 32,
        "adapter_out_dim": 64,
    },
    "gemma4": {"audio_config": None},  # as in the MoE that is published
    "gemma4_text": {
        **{"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32},
        **{"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
    },
    "glm4v_moe_text": {"rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm5_next_text": {"index_topk": 8, "index_kpool": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 0},
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention", "mamba", "attention"], "num_local_experts": 8, "num_experts_per_tok": 2},
        "shared_intermediate_size": 48,
    },
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 8, "moe_topk": 2},
    "hy_v4_vl_text": {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [2, 1, 1]}},
    "inkling_text": INKLING,
    "inkling2_text": {**INKLING, "n_layers_per_attn_res_block": 2},
    "inkling2_loop_text": {**INKLING, "n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_offset": 1, "mamba_dt_rank": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "llama4_text": {
        **{"num_experts_per_tok": 1, "intermediate_size_mlp": 96, "moe_layers": [1, 2, 3], "no_rope_layers": [1, 0, 1, 0]},
        **{"attention_chunk_size": 8, "floor_scale": 16},
    },
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 8},
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "num_sliding_attention_heads": 8,
        "sliding_window": 8,
    },
    "muse_spark_text": {"moe_hidden_size": 48, "layer_rope_theta": [5e5, 0, 5e5, 5e5]},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2},
        **{"hc_count": 2, "hc_lowrank": 8},
        "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Compiled, run and compared with transformers in the tests.
SUPPORTED = (
    *("afmoe", "aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2"),
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note", "dots3_note_text", "ernie4_5_moe"),
    *("ernie4_5_vl_moe", "exaone_moe", "flex_olmo", "flint", "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite"),
    *("glm4v_moe", "glm5_next", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid"),
    *("granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hy_v4_vl", "jamba", "kimi_k25", "kimi_linear", "kolibri1"),
    *("laguna", "lara_mini", "lfm2_moe", "llama4", "llama4_text", "mellum", "mimo_v2_flash", "minimax", "minimax_m2"),
    *("minimax_m3_vl", "minimax_m3_vl_text", "mistral4", "mistral_large4", "mixtral", "nemotron_h", "olmoe", "phimoe"),
    *("qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "sarvam_mla"),
    *("sarvam_moe", "solar_open", "step3p7", "zaya"),
)
# Rejected with a sentence that contains these words.
REFUSED = {
    "deepseek_v4": "forgets tokens in a way of its own",
    "diffusion_gemma": "does not write a text token by token",
    "doge": "has no experts",
    "inkling_text": "a graph whose shapes contradict each other",
    "inkling2_text": "does not compute experts",
    "inkling2_loop_text": "does not compute experts",
    "jetmoe": "no layer of a JetMoeForCausalLM has experts",
    "qwen4_exp_text": "cannot be traced into a graph",
    "unlimited_ocr": "forgets tokens in a way of its own",
}
# No tiny checkpoint of them is written; what the test on their classes says, or why there is none.
NOT_TRIED = {
    "dbrx": "a config that transformers 5.24 cannot build",
    "inkling_mm_model": "its vision tower has no small config; its language model is inkling_text",
    "longcat_flash": "no small config; its experts are outside of the experts interface",
    "muse_spark": "a norm after each expert",
    "qwen3_omni_moe": "its thinker, talker and vocoder are run by a generate of its own",
}


def config_of(model_type: str, **changes: dict[str, Any]) -> PretrainedConfig:
    """The tiny config of a type; ``changes`` to its parts."""
    sizes = _sizes(AutoConfig.for_model(model_type))
    return AutoConfig.for_model(model_type, **sizes | {part: sizes[part] | values for part, values in changes.items()})


def _sizes(default: PretrainedConfig, tower: bool = False) -> dict[str, Any]:
    parts = {name: getattr(default, name, None) or kind() for name, kind in default.sub_configs.items()}
    sizes = {
        name: {**_sizes(part, tower or name in TOWERS), "model_type": part.model_type}
        for name, part in parts.items()
        if isinstance(part, PretrainedConfig)
    }
    return {**sizes, **(_tower(default) if tower else _small(default))}


def build(model_type: str, folder: Path, seed: int = 0, **changes: dict[str, Any]) -> Path:
    """Write a tiny checkpoint of the type with a tokenizer into ``folder`` and return it."""
    torch.manual_seed(seed)
    model = model_of(config_of(model_type, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # which experts a token goes to, whatever its hidden state
                buffer.copy_(torch.rand(len(buffer), 8, generator=generator).argsort(dim=1)[:, : buffer.shape[1]])
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    mappings: Any = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    found = next(mapping[type(config)] for mapping in mappings if type(config) in mapping)
    return (found[0] if isinstance(found, tuple) else found)(config)


def _small(default: PretrainedConfig) -> dict[str, Any]:
    stated = default.to_dict()
    sizes = {key: SIZES[key] for key, value in stated.items() if key in SIZES and value is not None}
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(stated.get(key), list):
            kinds = list(dict.fromkeys(stated[key]))
            sizes[key] = (kinds * LAYERS)[:LAYERS] if key == "layer_types" else (kinds + [kinds[-1]] * LAYERS)[:LAYERS]
    if "qk_rope_head_dim" in sizes and "kv_lora_rank" in sizes:  # latent attention
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return sizes | CHOSEN.get(default.model_type, {})


def _tower(default: PretrainedConfig) -> dict[str, Any]:
    return {
        key: TOWER_SIZES[key] for key, value in default.to_dict().items() if key in TOWER_SIZES and value is not None
    } | CHOSEN.get(default.model_type, {})
