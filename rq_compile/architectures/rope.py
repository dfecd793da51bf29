"""Rotary position embeddings (RoPE) in a config, in both spellings. Unsupported kinds are refused."""

import math
from typing import TYPE_CHECKING, Any

from rq_compile.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The numbers that each kind requires.
NUMBERS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
# transformers computes these kinds from config.head_dim, even in families that derive it from other values.
OF_HEAD_DIM = ("dynamic", "longrope", "yarn")
BY_LENGTH = ("dynamic", "longrope")


def stated_rope(config: dict[str, Any], default_theta: float | None = None) -> dict[str, Any]:
    """``rope_parameters`` of a ``config.json``, which may also be called ``rope_scaling``, with ``type`` for ``rope_type``."""
    stated = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = stated.pop("type", None)
    return {"rope_type": kind or "default", "rope_theta": config.get("rope_theta") or default_theta, **stated}


def with_head_dim(config: dict[str, Any], default: int | None) -> dict[str, Any]:
    """The config with ``head_dim`` if its rotary embeddings need it. ``default``: the value of the family."""
    if default is None and config.get("head_dim") is None and stated_rope(config)["rope_type"] in OF_HEAD_DIM:
        return {**config, "head_dim": config["hidden_size"] // config["num_attention_heads"]}
    return config


def check_rope(config: dict[str, Any], place: str) -> None:
    """Check the rotary embeddings of ``config``, a ``config.json``. ``place``: its name in messages.

    Raises:
        UserError: a kind does not exist in transformers, cannot be exported, or lacks a value.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if isinstance(language := config.get("text_config"), dict):
        check_rope({"model_type": config["model_type"], **language}, place)
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{place} has {key} {str(config[key])[:40]}, which is not an object; give one with a rope_type", 2)
    stated = stated_rope(config)
    by_layer = [stated_rope({"rope_parameters": value}) for value in stated.values() if isinstance(value, dict)]
    known = ("default", *ROPE_INIT_FUNCTIONS)
    for rope in by_layer or [stated]:
        kind = rope["rope_type"]
        asks = f"{place} asks for rope_type {str(kind)[:40]} (rope_scaling)"
        if kind not in known:
            raise UserError(f"{asks}, which is not supported; use a model with one of {', '.join(known)}", 2)
        if by_layer and kind in BY_LENGTH:
            raise UserError(f"{asks} in some layers only, which is not supported; use it in all layers or in none", 2)
        if rope["rope_theta"] is not None and not _number(rope["rope_theta"]):
            raise UserError(f"{asks} with rope_theta {rope['rope_theta']!r:.40}; correct it to a number of at least 0", 2)
        for key in NUMBERS.get(kind, ()):
            if not _positive(rope.get(key)):
                raise UserError(f"{asks} with {key} {rope.get(key)!r:.40}; correct it to a number above 0, or a list of them", 2)
        trained = "original_max_position_embeddings"
        if config["model_type"] == "phimoe" and kind != "default" and trained not in rope and trained not in config:
            raise UserError(f"{asks} without {trained}; add the length of the model's first training", 2)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _positive(value: Any) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return all(type(number) in (int, float) and 0 < number < math.inf for number in values)


def recomputed_beyond(config: "PretrainedConfig") -> int | None:
    """The length beyond which a KV cache is not continued. When a sequence first exceeds it, transformers' ``generate`` computes
    the sequence again, because Phi-3.5-MoE scales its rotary embedding differently from there on. None for models that keep their
    cache."""
    return getattr(config, "original_max_position_embeddings", None) if config.model_type == "phimoe" else None
