"""A check of the error for a rejected checkpoint, and .safetensors files with any header."""

import json
from pathlib import Path
from typing import Any

import pytest

from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError

INDEX = "model.safetensors.index.json"
PAIR = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [8, 12]},
}


def write(file: Path, header: object, data: bytes = bytes(12)) -> Path:
    """A .safetensors file with this header: bytes as they are, anything else as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return file


def one_sentence(error: UserError) -> str:
    message = str(error)
    assert "\n" not in message
    assert message.isprintable()
    message.encode()
    return message


def refused(path: Path, status: int = 2) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint.open(path)
    assert caught.value.exit_status == status
    return one_sentence(caught.value)


def changed(**changes: Any) -> dict[str, Any]:
    """``PAIR`` with changes to its tensor b."""
    return {**PAIR, "b": {**PAIR["b"], **changes}}
