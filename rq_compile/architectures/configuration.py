"""A checkpoint's transformers config.

Families whose code is not in transformers are mapped to a class that computes the same (``remote.py``).
"""

from typing import TYPE_CHECKING, Any

from rq_compile.architectures.agreement import check_layers, check_sizes
from rq_compile.architectures.config_values import in_declared_types, neutralized
from rq_compile.architectures.families import known_family
from rq_compile.architectures.rope import check_rope, stated_rope, with_head_dim
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.checkpoint.storage.stated import QUANTIZATION
from rq_compile.errors import UserError, reason

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A checkpoint must not decide how a model is run: the name of an attention may be a repository whose kernel would be downloaded.
RUNTIME_KEYS = ("attn_implementation", "experts_implementation", "auto_map", "transformers_weights", *QUANTIZATION)
# The settings that the published code of the families without transformers code supports.
REMOTE_ROPE_TYPES = ("default", "linear", "dynamic")


def model_config(checkpoint: Checkpoint) -> "PretrainedConfig":
    """The config with every default filled in.

    Raises:
        UserError: the family or a setting of its config is not supported, the config is not valid, or a stated size does not fit
            the checkpoint's tensors.
    """
    known_family(checkpoint)
    stated = {key: value for key, value in checkpoint.config.items() if not key.startswith("_") and key not in RUNTIME_KEYS}
    stated = neutralized(stated)
    check_layers(checkpoint, stated)
    check_rope(stated, str(checkpoint.path / "config.json"))
    make = {"llama_moe": _llama_moe, "deepseek": _deepseek}.get(checkpoint.model_type, _of_transformers)
    try:
        config = make(stated)
    except UserError:
        raise
    except Exception as error:  # transformers' validators and converters raise many kinds of exceptions
        told = f"no {error}" if isinstance(error, KeyError) else reason(error)
        file = checkpoint.path / "config.json"
        raise UserError(
            f"{file} is not a valid {checkpoint.model_type} config: {told}; correct it",
            2,
        ) from error
    check_sizes(checkpoint, config)
    return config


def _of_transformers(config: dict[str, Any]) -> "PretrainedConfig":
    from transformers import AutoConfig, PretrainedConfig

    # JSON has no infinity. transformers writes it as an object, and has no public function that reads this object.
    return AutoConfig.for_model(**_declared(PretrainedConfig._decode_special_floats(config)))


def _declared(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its values in their declared types, also in the parts of a multimodal model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parts = {
        key: _declared(neutralized(value))
        for key, value in config.items()
        if isinstance(value, dict) and value.get("model_type") in CONFIG_MAPPING
    }
    family = CONFIG_MAPPING[config["model_type"]]
    return {**with_head_dim(in_declared_types(config, family), getattr(family, "head_dim", 0)), **parts}


def _llama_moe(config: dict[str, Any]) -> "PretrainedConfig":
    """LLaMA-MoE-v1 is Mixtral with another router, see ``remote.py``."""
    from transformers import MixtralConfig

    for key, expected in (
        ("gate_type", "TopKBalancedNoisyGate"),
        ("gate_network", "mlp"),
        ("gate_use_softmax", True),
        ("calculator_type", "UniversalCalculator"),
        ("multiply_gate_scores", True),
        ("add_weight_norm", False),
    ):
        if config.get(key, expected) != expected:
            raise UserError(f"llama_moe with {key}={config[key]} is not supported; use a LLaMA-MoE-v1 model with {expected}")
    values = {
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": 1e-6,
        **_rope(config),
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "num_local_experts": config["num_experts"],
        "num_experts_per_tok": config["num_selects"],
        "intermediate_size": _expert_size(config),
    }
    return MixtralConfig(**in_declared_types(values, MixtralConfig))


def _expert_size(config: dict[str, Any]) -> int:
    sizes = {size for layer in config.get("size_experts") or [] for size in (layer if isinstance(layer, list) else [layer])}
    if not sizes:
        return config["intermediate_size"] // config["num_experts"]
    if len(sizes) > 1:
        raise UserError(f"llama_moe with size_experts from {min(sizes)} to {max(sizes)} is not supported; use equal experts")
    return sizes.pop()


def _deepseek(config: dict[str, Any]) -> "PretrainedConfig":
    """DeepSeek-MoE (the first, without latent attention) is Qwen2-MoE with an ungated shared expert, see ``remote.py``."""
    from transformers import Qwen2MoeConfig

    for key, expected in (("scoring_func", "softmax"), ("attention_bias", False)):
        if config.get(key, expected) != expected:
            raise UserError(f"deepseek with {key}={config[key]} is not supported; use a DeepSeek-MoE model with {expected}")
    first, frequency = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    dense = [layer for layer in range(config["num_hidden_layers"]) if layer < first or layer % frequency]
    values = {
        "num_key_value_heads": config["num_attention_heads"],
        **_rope(config),
        "num_experts": config["n_routed_experts"],
        "shared_expert_intermediate_size": config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0),
        "mlp_only_layers": dense,
        "qkv_bias": False,
        "use_sliding_window": False,
    }
    return Qwen2MoeConfig(**in_declared_types(values, Qwen2MoeConfig))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    dropped = ("model_type", "auto_map", "architectures", "rope_theta", "rope_scaling", "rope_parameters", "num_experts")
    kept = {key: value for key, value in config.items() if key not in dropped}
    rope = stated_rope(config, default_theta=10000.0)
    if rope["rope_type"] not in REMOTE_ROPE_TYPES:
        raise UserError(
            f"{config['model_type']} with rope_scaling of type {rope['rope_type']} is not supported, also not by its published "
            f"code; use a model with {', '.join(REMOTE_ROPE_TYPES)}",
            2,
        )
    return {**kept, "rope_parameters": rope}
