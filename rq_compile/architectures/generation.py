"""The tokens at which generation begins and ends, and how tokens are chosen, as in transformers' ``model.generate``."""

import math
from typing import Any

from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.checkpoint.folder import read_json
from rq_compile.errors import UserError
from rq_compile.standalone.sampling import SamplingError, SamplingParams

# Keys under which a config without ``eos_token_id`` may have that of its decoder.
NESTED = ("decoder", "generator", "text_config")
# Keys of generation_config.json, which SamplingParams calls by the same names.
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def end_of_text(checkpoint: Checkpoint) -> list[int]:
    """The tokens that end a text; empty if there are none.

    If ``generation_config.json`` exists, it decides, even if it names no token. Otherwise, ``config.json`` decides.

    Raises:
        UserError: a file cannot be read, or the value is neither an integer nor a list of integers.
    """
    said = _generation_config(checkpoint)
    if said is None:
        nested: Any = next((checkpoint.config[key] for key in NESTED if checkpoint.config.get(key)), None)
        said = checkpoint.config
        if said.get("eos_token_id") is None and isinstance(nested, dict):
            said = nested
    value = said.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(_whole(checkpoint, "eos_token_id", one) for one in values))


def decoder_start(checkpoint: Checkpoint) -> int | None:
    """The first token of an encoder-decoder's decoder.

    Raises:
        UserError: see ``end_of_text``.
    """
    value = (checkpoint.config | (_generation_config(checkpoint) or {})).get("decoder_start_token_id")
    return None if value is None else _whole(checkpoint, "decoder_start_token_id", value)


def context_length(checkpoint: Checkpoint) -> int | None:
    """The context length of the model, in positions.

    Raises:
        UserError: it is not an integer.
    """
    nested: Any = next((checkpoint.config[key] for key in NESTED if isinstance(checkpoint.config.get(key), dict)), {})
    value = checkpoint.config.get("max_position_embeddings", nested.get("max_position_embeddings"))
    return None if value is None else _whole(checkpoint, "max_position_embeddings", value)


def sampling(checkpoint: Checkpoint) -> dict[str, float]:
    """The values of ``SamplingParams`` that ``generation_config.json`` states, and the temperature: 0 without ``do_sample``.

    Raises:
        UserError: the file cannot be read, or a value is out of range.
    """
    said = _generation_config(checkpoint) or {}
    drawn = said.get("do_sample") is True
    wanted = ("repetition_penalty", *(SAMPLING if drawn else ()))
    stated = {"temperature": float(drawn), **{name: said[name] for name in wanted if said.get(name) is not None}}
    try:
        SamplingParams(**stated)
    except SamplingError as error:
        fault, _, _ = str(error).partition("; ")
        raise UserError(f"{checkpoint.path}: {fault} in generation_config.json; correct it there", 2) from error
    return stated


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    path = checkpoint.path / "generation_config.json"
    return read_json(path) if path.exists() else None


def _whole(checkpoint: Checkpoint, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise UserError(
            f"{checkpoint.path} has {key} {repr(value)[:40]}, which is not a whole number; correct its config files", 2
        )
    return int(value)
