"""The values of a config.json in their declared types, and without settings that only training or printing needs."""

import dataclasses
from typing import TYPE_CHECKING, Any

from rq_compile.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Settings of training, and of additional results of a forward pass. In inference, no logit depends on them, but some of them (the
# load-balancing loss over the router's logits) prevent an export. A router's jitter is not among them, because Phi-MoE also uses
# it in inference.
NEUTRAL: dict[str, Any] = {
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_cache": True,
    "torchscript": False,
    "gradient_checkpointing": False,
    "use_gradient_checkpointing": False,
    "chunk_size_feed_forward": 0,
    "problem_type": None,
    **dict.fromkeys(("attention_dropout", "attn_dropout", "attn_pdrop", "hidden_dropout", "resid_pdrop"), 0.0),
    **dict.fromkeys(("residual_dropout", "embd_pdrop", "expert_dropout", "dropout_rate", "dropout", "layerdrop"), 0.0),
}


def neutralized(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with each of its settings in ``NEUTRAL`` set to the neutral value."""
    return {key: NEUTRAL.get(key, value) for key, value in config.items()}


def values_of(config: "PretrainedConfig", key: str) -> list[Any]:
    """All values of ``key`` in ``config``: several if it is a list or if layers differ in it, none if the key is missing."""
    if key in (getattr(config, "per_layer_attributes", None) or ()):
        return list(dict.fromkeys(getattr(layer, key) for layer in config.per_layer_config))
    value = getattr(config, key, None)
    return value if isinstance(value, list) else [value] if hasattr(config, key) else []


def in_declared_types(config: dict[str, Any], config_class: "type[PretrainedConfig]") -> dict[str, Any]:
    """``config`` with each number in the type that ``config_class`` declares: 7 becomes 7.0 for a float, 2.0 becomes 2 for an
    int. Other values are left to the class.

    Raises:
        UserError: there is a list instead of a number: layers that differ in this value are not supported.
    """
    declared = {field.name: _kinds(field.type) for field in dataclasses.fields(config_class)}
    return {
        key: _declared(key, value, declared.get(config_class.attribute_map.get(key, key), frozenset()))
        for key, value in config.items()
    }


def _kinds(declared: Any) -> frozenset[str]:
    """The names of the types in an annotation: {"int", "None"} for ``int | None``. Some classes have annotations as text."""
    return frozenset(part.strip() for part in str(getattr(declared, "__name__", declared)).split("|"))


def _declared(key: str, value: Any, kinds: frozenset[str]) -> Any:
    if type(value) is list and "int" in kinds and not any(kind.startswith(("list", "tuple")) for kind in kinds):
        raise UserError(
            f"config.json says {key} {repr(value)[:40]}, but one number for all layers is expected; "
            "give a model whose layers have the same value",
            2,
        )
    if type(value) not in (int, float) or type(value).__name__ in kinds:
        return value
    if type(value) is int and "float" in kinds:
        return float(value)
    if type(value) is float and "int" in kinds and value.is_integer():
        return int(value)
    return bool(value) if "bool" in kinds and value in (0, 1) else value
