"""Tiny random checkpoints of every supported family, in the layout of the published checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

VOCABULARY = 128
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

DECODER_START: dict[str, Any] = {"decoder_start_token_id": 2}  # of the base class

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "olmoe": lambda: OlmoeConfig(**COMMON, num_experts=8),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **{**COMMON, "num_hidden_layers": 3},
        num_experts=8,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **{**COMMON, "tie_word_embeddings": True, "head_dim": 8}, num_experts=8, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "phimoe": lambda: PhimoeConfig(**COMMON, num_local_experts=4, attention_bias=True, lm_head_bias=True),
    "deepseek_v2": lambda: DeepseekV2Config(**{**COMMON, **LATENT}, routed_scaling_factor=1.5, topk_method="greedy", n_group=1),
    "deepseek_v3": lambda: DeepseekV3Config(**{**COMMON, **LATENT}, n_group=4, topk_group=2, num_mtp_layers=0),
    "gpt_oss": lambda: GptOssConfig(**COMMON, num_local_experts=4, head_dim=8, sliding_window=8),
    "granitemoe": lambda: GraniteMoeConfig(
        **{**COMMON, "tie_word_embeddings": True},
        num_local_experts=8,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.4,
        logits_scaling=1.5,
    ),
    "switch_transformers": lambda: SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        expert_capacity=64,
        eos_token_id=1,
        pad_token_id=2,
        **DECODER_START,
    ),
}
REMOTE_CONFIGS: dict[str, dict[str, Any]] = {
    "llama_moe": {
        **{key: value for key, value in COMMON.items() if key != "num_experts_per_tok"},
        "model_type": "llama_moe",
        "architectures": ["LlamaMoEForCausalLM"],
        "hidden_act": "silu",
        "intermediate_size": 128,
        "num_experts": 4,
        "num_selects": 2,
        "size_experts": [[32] * 4] * 2,
        "gate_type": "TopKBalancedNoisyGate",
        "gate_network": "mlp",
        "gate_use_softmax": True,
        "calculator_type": "UniversalCalculator",
        "multiply_gate_scores": True,
        "score_scale_factor": 2.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
    },
    "deepseek": {
        **COMMON,
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
    },
}
FAMILIES = (*CONFIGS, *REMOTE_CONFIGS)


def build(family: str, directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a tiny checkpoint of ``family`` with a tokenizer into ``directory`` and return it.

    ``changes`` replace settings of the config, for a family that transformers supports."""
    directory.mkdir(parents=True, exist_ok=True)
    if family in REMOTE_CONFIGS:
        _build_remote(family, directory, seed, dtype)
    else:
        config = CONFIGS[family]()
        config.update(changes)
        mapping: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
        model = mapping[type(config)](config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                tensor.copy_(_values(name, tensor.shape, generator))
            for name, tensor in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        model.to(dtype).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of single ASCII characters; words are split into characters."""
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate(special + letters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _values(name: str, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * values
    if name.endswith(("router.weight", "gate.weight", "classifier.weight", "layer.weight")) or "gate_network" in name:
        # Decisive routing: the tests compare implementations, which may differ if two experts' scores differ only by rounding.
        return values * 0.8
    if len(shape) < 2:
        return values * 0.1
    return values * 0.2


def _build_remote(family: str, directory: Path, seed: int, dtype: torch.dtype) -> None:
    config = REMOTE_CONFIGS[family]
    shapes = remote_shapes(family)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _values(name, shape, generator).to(dtype) for name, shape in shapes.items()}
    (directory / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=1))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def remote_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes as in the published checkpoints of the two families without transformers code."""
    config = REMOTE_CONFIGS[family]
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    kv = hidden // heads * kv_heads
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (hidden if p in "qo" else kv, hidden) for p in "qkvo"}
        if family == "llama_moe":
            experts, size = config["num_experts"], config["size_experts"][layer][0]
            shapes[f"{at}.mlp.gate.gate_network.0.weight"] = (experts, hidden)
            shapes[f"{at}.mlp.gate.gate_network.2.weight"] = (experts, experts)
            shapes[f"{at}.mlp.gate.weight_noise.weight"] = (experts, hidden)
            for expert in range(experts):
                calculator = f"{at}.mlp.calculator.experts"
                shapes |= {f"{calculator}.weight_{p}.{expert}": (size, hidden) for p in ("gate", "up")}
                shapes[f"{calculator}.weight_down.{expert}"] = (hidden, size)
        elif layer < config["first_k_dense_replace"]:
            shapes |= _mlp(f"{at}.mlp", hidden, config["intermediate_size"])
        else:
            shapes[f"{at}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            for expert in range(config["n_routed_experts"]):
                shapes |= _mlp(f"{at}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
            shapes |= _mlp(f"{at}.mlp.shared_experts", hidden, config["moe_intermediate_size"] * config["n_shared_experts"])
    return shapes


def _mlp(at: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}.gate_proj.weight": (intermediate, hidden),
        f"{at}.up_proj.weight": (intermediate, hidden),
        f"{at}.down_proj.weight": (hidden, intermediate),
    }
