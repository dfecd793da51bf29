"""What a checkpoint says of its tokens, as a manifest has it."""

from typing import Any

from rq_compile.architectures.generation import context_length
from rq_compile.architectures.model import Model
from rq_compile.architectures.rope import BY_LENGTH
from rq_compile.checkpoint.folder import read_json

# Prompt tokens that run at once. More would not make experts busier by much, and attention scores take memory with each.
PREFILL_CHUNK = 512


def vocabulary(model: Model) -> dict[str, Any]:
    """Fields of ``Manifest``: how many tokens there are, which start and end a text, and how long it may be.

    Raises:
        UserError: a file that says so cannot be read, or gives something other than a whole number.
    """
    return {
        "vocabulary": model.text_config.vocab_size,
        "start_of_text": _start_of_text(model),
        # Others can never be generated.
        "end_of_text": [token for token in model.end_of_text if 0 <= token < model.text_config.vocab_size],
        "decoder_start": model.decoder_start,
        "context_length": context_length(model.checkpoint),
        "prefill_chunk": None if model.config.is_encoder_decoder or _rotates_by_length(model) else PREFILL_CHUNK,
    }


def remarks(model: Model) -> dict[str, int]:
    """What is missing or odd, as ``Manifest.replaced`` has it."""
    counts = {"no tokenizer.json in the checkpoint": int(not model.has_tokenizer)}
    if model.has_tokenizer:
        beyond = sum(token >= model.text_config.vocab_size for token in model.tokenizer.get_vocab().values())
        counts["tokens of the tokenizer that the model does not know"] = beyond
    return counts


def _start_of_text(model: Model) -> int | None:
    """The tokenizer's word on it: config.json may name a token that the tokenizer has for no such purpose (Qwen's do)."""
    settings = model.path / "tokenizer_config.json"
    if not settings.exists() or not model.has_tokenizer:
        return None
    token = read_json(settings).get("bos_token")
    if isinstance(token, dict):  # with how it is to be stripped
        token = token.get("content")
    return model.tokenizer.token_to_id(token) if isinstance(token, str) else None


def _rotates_by_length(model: Model) -> bool:
    """Whether frequencies follow from the length of the text, so that pieces of a prompt would be rotated otherwise than all of
    it. The parameters may be one set, or one for each kind of layer."""
    parameters = getattr(model.text_config, "rope_parameters", None) or {}
    return any(isinstance(some, dict) and some.get("rope_type") in BY_LENGTH for some in (parameters, *parameters.values()))
