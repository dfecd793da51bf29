"""One ``.safetensors`` file: its header checked as hostile input, and one tensor or slice read at a time.

Only files that follow the definition of the format are accepted (https://huggingface.co/docs/safetensors): tensors follow each
other from the first byte after the header to the last byte of the file, without holes or overlaps, and the length of each agrees
with its shape and dtype. Whatever a header claims, nothing outside the file is read, and nothing large is allocated unchecked.

Reads use the file, not a memory map, so that the memory is freed together with the array.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rq_compile.checkpoint.folder import refuse_pointer
from rq_compile.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_DIMENSIONS = 32
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# The bits of +infinity. Apart from the sign, all values that are not below are infinite or NaN.
INFINITY: dict[str, int] = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor. ``offset`` counts bytes from the start of ``file``; ``dtype`` is safetensors' name of the dtype."""

    file: Path
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


def tensors_of(file: Path) -> dict[str, StoredTensor]:
    """The tensors that the header of ``file`` lists, in the order of their bytes.

    Raises:
        UserError: the file cannot be read, is not a safetensors file, is truncated or damaged, or holds a dtype that only
            quantized checkpoints have.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file; put the weights there, or remove it", 2)
    refuse_pointer(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = 8 + int.from_bytes(opened.read(8), "little")
            raw = opened.read(start - 8) if start <= min(size, 8 + MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; check the path and its permissions", 2) from error
    if size < start:
        raise UserError(f"{file} is truncated: it has {size} bytes, but its header alone needs {start}; download it again", 2)
    if start > 8 + MAX_HEADER_BYTES:
        raise UserError(f"{file} is not a safetensors file: its header has {start - 8} bytes; download it again", 2)
    tensors = {name: _stored_tensor(file, start, name, entry) for name, entry in _entries(file, raw).items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes))
    position = start
    for name, tensor in ordered:
        if tensor.offset + tensor.bytes > size:
            end = tensor.offset + tensor.bytes
            raise UserError(f"{file} is truncated: it has {size} bytes, but {name} ends at {end}; download it again", 2)
        if tensor.offset != position:
            what = (
                "overlaps the tensor before it" if tensor.offset < position else f"starts {tensor.offset - position} bytes late"
            )
            raise _damaged(file, f"{name} {what}")
        position += tensor.bytes
    if position != size:
        raise _damaged(file, f"its last {size - position} bytes do not belong to a tensor")
    return dict(ordered)


def read_tensor(name: str, tensor: StoredTensor, index: int | None = None) -> np.ndarray:
    """The whole tensor, or its slice ``index`` of the first dimension, in its stored dtype.

    Raises:
        UserError: the file cannot be read or has become shorter, or a value is infinite or NaN.
    """
    shape = tensor.shape if index is None else tensor.shape[1:]
    count = math.prod(shape)
    return _read(name, tensor, (index or 0) * count, count).reshape(shape)


def _read(name: str, tensor: StoredTensor, first: int, count: int) -> np.ndarray:
    """``count`` values of a tensor, from the ``first`` on."""
    dtype = DTYPES[tensor.dtype]
    try:
        values = np.fromfile(tensor.file, dtype=dtype, count=count, offset=tensor.offset + first * dtype.itemsize)
    except OSError as error:
        raise UserError(f"cannot read {name} from {tensor.file}: {error.strerror}; check the disk") from error
    if len(values) != count:
        raise UserError(f"{tensor.file} has become shorter while it was read: {name} is incomplete; download it again")
    check_finite(name, tensor, values)
    return values


def read_rows(name: str, tensor: StoredTensor, rows: slice, count: int) -> np.ndarray:
    """``rows`` of a tensor that is divided into ``count`` rows of equal length, ``[rows, ...]`` in its stored dtype.

    Raises:
        UserError: see ``read_tensor``.
    """
    width = math.prod(tensor.shape) // count if count else 0
    start, stop, _ = rows.indices(count)
    values = _read(name, tensor, start * width, (stop - start) * width)
    return values.reshape(stop - start, width)


def check_finite(name: str, tensor: StoredTensor, values: np.ndarray) -> None:
    """``values``: the tensor or a contiguous part of it, also as bytes.

    Raises:
        UserError: a value is infinite or NaN.
    """
    require_finite(name, tensor, all_finite(values, tensor.dtype))


def require_finite(name: str, tensor: StoredTensor, finite: bool) -> None:
    """
    Raises:
        UserError: not ``finite``.
    """
    if not finite:
        raise not_finite(name, tensor)


def not_finite(name: str, tensor: StoredTensor) -> UserError:
    return UserError(f"{name} in {tensor.file} has a weight that is not finite; repair the checkpoint")


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether no value of contiguous ``values``, of the safetensors ``dtype``, is infinite or NaN.

    Compares the bits, at the speed of memory. ``np.isfinite`` of bf16 is ten times slower and allocates an array.
    """
    if dtype not in INFINITY or not values.size:
        return True
    # As signed integers, negative values are below all others; as unsigned integers, they are above.
    bits, size = INFINITY[dtype], DTYPES[dtype].itemsize
    sign = 1 << (8 * size - 1)
    flat = values.reshape(-1)
    return bool(flat.view(f"i{size}").max() < bits and flat.view(f"u{size}").max() < sign + bits)


def read_ends(tensors: Iterable[StoredTensor], length: int) -> Iterator[bytes]:
    """The first and the last ``length`` bytes of each tensor (if it is shorter, the whole tensor twice). A file is opened once
    for neighbouring tensors, because a checkpoint can have a hundred thousand.

    Raises:
        UserError: a file cannot be read.
    """
    for file, neighbours in groupby(tensors, key=lambda tensor: tensor.file):
        try:
            with file.open("rb", buffering=0) as opened:
                for tensor in neighbours:
                    count = min(length, tensor.bytes)
                    ends = (tensor.offset, tensor.offset + tensor.bytes - count)
                    yield b"".join(os.pread(opened.fileno(), count, end) for end in ends)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}; check its permissions", 2) from error


def _entries(file: Path, raw: bytes) -> dict[str, Any]:
    """The header's JSON object, without its free-form metadata."""
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
    except DuplicateName as error:
        raise _damaged(file, f"its header names {error.name} twice") from error
    except (ValueError, RecursionError) as error:
        raise _no_safetensors(file) from error
    # Names appear in messages, so line breaks, control sequences and text that cannot be encoded are refused.
    if not isinstance(header, dict) or not all(name.isprintable() for name in header):
        raise _no_safetensors(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _no_safetensors(file)
    return header


class DuplicateName(Exception):
    def __init__(self, name: str) -> None:
        self.name = name if name.isprintable() else repr(name)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise DuplicateName(next(name for name, count in counts.items() if count > 1))
    return entries


def _stored_tensor(file: Path, start: int, name: str, entry: Any) -> StoredTensor:
    """One entry of the header; ``start`` is where the tensors' bytes begin."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _no_safetensors(file)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not dtype.isprintable():
        raise _damaged(file, f"{name} has no dtype")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(file, f"{name} does not have a shape of whole numbers")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"{name} does not have two ordered offsets")
    if dtype not in DTYPES:
        raise UserError(
            f"{name} in {file} is stored as {dtype}, which is not supported; use the 16-bit checkpoint that it was made from", 2
        )
    length, itemsize = offsets[1] - offsets[0], DTYPES[dtype].itemsize
    # The size of the file does not limit the other dimensions of an empty tensor, but numpy multiplies them.
    if math.prod(shape) * itemsize != length or math.prod(filter(None, shape)) * itemsize >= 2**63:
        raise _damaged(file, f"the shape {shape} of {name}, as {dtype}, does not fit its {length} bytes")
    return StoredTensor(file, start + offsets[0], length, dtype, tuple(shape))


def _counts(value: Any) -> bool:
    # isinstance treats JSON's true as an int.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file} is damaged: {what}; download it again", 2)


def _no_safetensors(file: Path) -> UserError:
    return UserError(f"{file} is not a safetensors file: its header cannot be read; download it again", 2)
