"""The weights file of an engine: tensors streamed one chunk at a time, aligned, none written twice."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import onnx

from rq_compile.rewrite.weights import ExternalWeight, external_name, external_offset, external_tensors, stored, stored_bytes

ALIGNMENT = 64
Progress = Callable[[int, int], None]


@dataclass
class WeightsFile:
    """Where each weight starts, the file's length in bytes, its sha256, and the tensors and bytes not written twice."""

    starts: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    shared: int = 0
    shared_bytes: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


def write_weights(weights: Iterable[ExternalWeight], file: BinaryIO, progress: Progress | None = None) -> WeightsFile:
    """Write ``weights`` in order, each at a multiple of 64 bytes; a one-chunk tensor equal to an earlier one is not repeated.

    ``progress(done, total)`` is called in bytes after each chunk.

    Raises:
        ValueError: a weight's chunks do not add up to its shape.
        OSError: the disk is full or the file cannot be written.
    """
    weights = list(weights)
    written = WeightsFile()
    seen: dict[tuple[bytes, np.dtype], int] = {}
    total, done = sum(weight.bytes for weight in weights), 0

    def put(data: bytes | memoryview) -> None:
        file.write(data)
        written.digest.update(data)
        written.bytes += len(data)

    for weight in weights:
        size = 0
        for chunk in weight.chunks():
            data = stored(chunk, weight.dtype).data
            content = (hashlib.sha256(data).digest(), weight.dtype)
            whole = len(data) == weight.bytes
            if whole and content in seen:
                written.starts[weight.name] = seen[content]
                written.shared += 1
                written.shared_bytes += weight.bytes
            else:
                if not size:
                    put(bytes(-written.bytes % ALIGNMENT))
                    written.starts[weight.name] = written.bytes
                put(data)
                if whole:
                    seen[content] = written.starts[weight.name]
            size += len(data)
            done += len(data)
            if progress:
                progress(done, total)
        if size != weight.bytes:
            raise ValueError(f"{weight.name} has {size} bytes, but its shape {weight.shape} asks for {weight.bytes}")
    return written


def locate(model: onnx.ModelProto, written: WeightsFile, file_name: str) -> None:
    """Point every external tensor of ``model`` at its bytes in ``file_name``."""
    for tensor in external_tensors(model.graph):
        start = written.starts[external_name(tensor)] + external_offset(tensor)
        size = stored_bytes(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)), tensor.dims)
        del tensor.external_data[:]
        for key, value in (("location", file_name), ("offset", str(start)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
