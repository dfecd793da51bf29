"""A checkpoint's statements about its tokens, in the form of a manifest."""

from typing import Any

from rq_compile.architectures.generation import context_length
from rq_compile.architectures.model import Model
from rq_compile.architectures.rope import BY_LENGTH
from rq_compile.checkpoint.folder import read_json
from rq_compile.engine.manifest import SamplingDefaults
from rq_compile.standalone.chat_template import ChatTemplate, ChatTemplateError

# Prompt tokens that run in one step. More would not give experts much larger batches, and attention scores would take more
# memory.
PREFILL_CHUNK = 512


def vocabulary(model: Model) -> dict[str, Any]:
    """Fields of ``Manifest``: the number of tokens, the tokens that start and end a text, the context length, and how prompts
    may run.

    Raises:
        UserError: config.json or generation_config.json cannot be read, or a token id is not an integer.
    """
    return {
        "vocabulary": model.text_config.vocab_size,
        "start_of_text": _start_of_text(model),
        # Tokens beyond the vocabulary can never be generated.
        "end_of_text": [token for token in model.end_of_text if 0 <= token < model.text_config.vocab_size],
        "decoder_start": model.decoder_start,
        "sampling": SamplingDefaults.model_validate(model.sampling),
        "context_length": context_length(model.checkpoint),
        "prefill_chunk": None if model.config.is_encoder_decoder or _rotates_by_length(model) else PREFILL_CHUNK,
        # Llama 4 scales attention by a token's place in the cache, which padding moves, not by its position.
        "padding_changes_logits": bool(getattr(model.text_config, "attn_temperature_tuning", False)),
    }


def remarks(model: Model) -> dict[str, int]:
    """What is missing or unusual, in the form of ``Manifest.replaced``."""
    counts = {"no tokenizer.json in the checkpoint": int(not model.has_tokenizer)}
    if model.has_tokenizer:
        beyond = sum(token >= model.text_config.vocab_size for token in model.tokenizer.get_vocab().values())
        counts["tokens of the tokenizer that the model does not know"] = beyond
    counts["chat templates left out because they are not valid"] = int(model.chat_template is not None and not has_chat(model))
    return counts


def has_chat(model: Model) -> bool:
    """Whether the checkpoint has a chat template that can be used."""
    if model.chat_template is None:
        return False
    try:
        ChatTemplate(model.chat_template)
    except ChatTemplateError:
        return False
    return True


def _start_of_text(model: Model) -> int | None:
    """The token that the tokenizer names. config.json may name one that the tokenizer does not use in this way (Qwen's do)."""
    settings = model.path / "tokenizer_config.json"
    if not settings.exists() or not model.has_tokenizer:
        return None
    token = read_json(settings).get("bos_token")
    if isinstance(token, dict):  # together with settings for stripping
        token = token.get("content")
    return model.tokenizer.token_to_id(token) if isinstance(token, str) else None


def _rotates_by_length(model: Model) -> bool:
    """Whether frequencies depend on the length of the text, so that pieces of a prompt would be rotated differently from the
    whole prompt. There may be one set of parameters, or one for each kind of layer."""
    parameters = getattr(model.text_config, "rope_parameters", None) or {}
    return any(isinstance(some, dict) and some.get("rope_type") in BY_LENGTH for some in (parameters, *parameters.values()))
