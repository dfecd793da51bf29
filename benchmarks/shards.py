"""A checkpoint's files: config, tokenizer, index and shards. The caller writes the weights' values or leaves them out."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

TOKENIZER = (
    Path(__file__).parents[1] / "samples" / "olmoe" / "tokenizer.json"
)  # a stand-in: the published ones have different vocabularies
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
SHARD = 5 * 10**9
Tensors = dict[str, tuple[str, tuple[int, ...]]]
# Writes the values of a shard: given the file, positioned after the header, its tensors and the number of the shard.
Fill = Callable[[BinaryIO, Tensors, int], object]


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: Tensors, fill: Fill, shard_bytes: int = SHARD) -> Path:
    """Create ``folder`` and write a checkpoint with ``config`` and ``tensors`` (name to dtype and shape) into it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(TOKENIZER, folder)
    shards = list(_shards(tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            fill(file, shard, number)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(map(bytes_of, tensors.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def leave_out(file: BinaryIO, tensors: Tensors, number: int) -> None:
    """Write zeros that take no space on the disk."""
    file.truncate(file.tell() + sum(map(bytes_of, tensors.values())))


def bytes_of(tensor: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = tensor
    return BYTES[dtype] * math.prod(shape)


def _shards(tensors: Tensors, shard_bytes: int) -> Iterator[Tensors]:
    shard: Tensors = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + bytes_of(tensor) > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += bytes_of(tensor)
    yield shard


def _header(tensors: Tensors) -> bytes:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + bytes_of((dtype, shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded
