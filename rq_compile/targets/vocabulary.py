"""What a checkpoint says of its tokens, as a manifest has it."""

from pathlib import Path
from typing import Any

from rq_compile.architectures.model import Model
from rq_compile.checkpoint.folder import read_json
from rq_compile.checkpoint.tokenizer import read_tokenizer
from rq_compile.errors import UserError


def vocabulary(model: Model) -> dict[str, Any]:
    """Fields of ``Manifest``: how many tokens there are, which start and end a text, and how long it may be.

    Raises:
        UserError: a file that says so cannot be read, or says no whole number.
    """
    path = model.path / "generation_config.json"
    said = model.stated | (read_json(path) if path.exists() else {})
    end = said.get("eos_token_id")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    start, length = said.get("decoder_start_token_id"), model.stated.get("max_position_embeddings")
    optional = (("decoder_start_token_id", start), ("max_position_embeddings", length))
    for key, number in (*(("eos_token_id", one) for one in ends), *(pair for pair in optional if pair[1] is not None)):
        if type(number) is not int:
            raise UserError(
                f"{model.path} has {key} {repr(number)[:40]}, which is not a whole number; correct its config files", 2
            )
    return {
        "vocabulary": model.text_config.vocab_size,
        "start_of_text": _start_of_text(model.path),
        "end_of_text": ends,
        "decoder_start": start,
        "context_length": length,
    }


def _start_of_text(folder: Path) -> int | None:
    """The tokenizer's word on it: config.json may name a token that the tokenizer has for no such purpose (Qwen's do)."""
    settings, tokenizer = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not settings.exists() or not tokenizer.exists():
        return None
    token = read_json(settings).get("bos_token")
    if isinstance(token, dict):  # with how it is to be stripped
        token = token.get("content")
    return read_tokenizer(tokenizer).token_to_id(token) if isinstance(token, str) else None
