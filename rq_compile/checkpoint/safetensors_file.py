"""One ``.safetensors`` file: its header checked against the file's size, and one tensor or slice read at a time.

Reads go through the file, not through a memory map, so that what was read leaves the resident memory again with the array.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from rq_compile.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``offset`` counts bytes from the start of ``file``; ``dtype`` is safetensors' name for it."""

    file: Path
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


def tensors_of(file: Path) -> dict[str, StoredTensor]:
    """The tensors that the header of ``file`` lists.

    Raises:
        UserError: the file cannot be read, is no safetensors file, or ends before its last tensor.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            raw = opened.read(length) if length <= size else b""
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; check the path and its permissions", 2) from error
    if size < 8 + length:
        raise UserError(f"{file} is truncated: {size} bytes are there, its header alone needs {8 + length}; download it again", 2)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                file,
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
                entry["dtype"],
                tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{file} is not a safetensors file: its header cannot be read; download it again", 2) from error
    for name, tensor in tensors.items():
        if tensor.offset + tensor.bytes > size:
            raise UserError(
                f"{file} is truncated: {size} bytes are there, {name} ends at {tensor.offset + tensor.bytes}; download it again",
                2,
            )
        known = DTYPES.get(tensor.dtype)
        if known is not None and math.prod(tensor.shape) * known.itemsize != tensor.bytes:
            raise UserError(
                f"{file} is damaged: the shape {tensor.shape} of {name} does not fit its {tensor.bytes} bytes; download it again",
                2,
            )
    return tensors


def read_tensor(name: str, tensor: StoredTensor, index: int | None = None) -> np.ndarray:
    """The whole tensor, or its slice ``index`` of the first dimension, in its stored dtype.

    Raises:
        UserError: the dtype is one that only quantized checkpoints have.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise UserError(f"{name} is stored as {tensor.dtype}; dequantize the checkpoint to bf16 first", 2)
    shape = tensor.shape if index is None else tensor.shape[1:]
    count = math.prod(shape)
    offset = tensor.offset + (index or 0) * count * dtype.itemsize
    return np.fromfile(tensor.file, dtype=dtype, count=count, offset=offset).reshape(shape)


def read_ends(tensor: StoredTensor, length: int) -> bytes:
    """The first and the last ``length`` bytes of a tensor (all of it when shorter, twice)."""
    length = min(length, tensor.bytes)
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        first = file.read(length)
        file.seek(tensor.offset + tensor.bytes - length)
        return first + file.read(length)
