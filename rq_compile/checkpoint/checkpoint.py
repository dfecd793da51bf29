"""A Hugging Face checkpoint folder, opened lazily: headers on opening, one tensor or slice at a time afterwards."""

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rq_compile.checkpoint.folder import checkpoint_below, file_in, read_json, refuse_links_outward, refuse_pointer
from rq_compile.checkpoint.safetensors_file import DTYPES, StoredTensor, read_ends, read_tensor
from rq_compile.checkpoint.shards import stored_tensors
from rq_compile.errors import UserError
from rq_compile.quantization.formats import Format

SAMPLE = 4096
FLOATS: dict[str, Format] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
# Those that repositories keep in git-lfs beside the weights.
SMALL_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "generation_config.json")
QUANTIZATION = ("quantization_config", "compression_config")
# What quantized weights have beside them.
SCALES = re.compile(
    r"(weight_(scale|scale_inv|scale_2|packed|zero_point|shape)|_(blocks|scales)|\.(qweight|qzeros|scales|g_idx|SCB))$"
)


@dataclass(frozen=True)
class Checkpoint:
    """``config`` is the parsed ``config.json``. Tensors are named as in the files, see ``names``.

    ``absent`` are tensors that the index lists and no file holds -> the file that it names for them; ``remarks`` are sentences on
    what is odd about the files.

    Every value that is read of a checkpoint goes through ``read``, ``read_row`` or ``mapped``.
    """

    path: Path
    config: dict[str, Any]
    _tensors: dict[str, StoredTensor] = field(repr=False)
    absent: dict[str, str] = field(default_factory=dict, repr=False)
    remarks: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Read the config and the headers of all shards; no weights.

        Raises:
            UserError: no such directory, a link that leads out of it, no config.json, no safetensors, or a shard that is damaged
                (see ``stored_tensors``).
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"no such directory: {path}; give a local Hugging Face checkpoint directory", 2)
        refuse_links_outward(path)
        if not (path / "config.json").exists() and (below := checkpoint_below(path)):
            raise UserError(f"{path} is not a checkpoint, but {below} is; give that one", 2)
        for file in (path / name for name in SMALL_FILES):
            refuse_pointer(file)
        config = read_json(path / "config.json")
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or not model_type.isprintable():
            raise UserError(f"{path / 'config.json'} names no model_type; give a Hugging Face checkpoint directory", 2)
        shards = stored_tensors(path)
        remarks = [*shards.remarks, *_left_over(path, config, shards.tensors)]
        return cls(path, config, shards.tensors, shards.absent, tuple(remarks))

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    @cached_property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({tensor.file for tensor in self._tensors.values()})

    @cached_property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes of the tensors by safetensors' name of their dtype."""
        total: Counter[str] = Counter()
        for tensor in self._tensors.values():
            total[tensor.dtype] += tensor.bytes
        return dict(total.most_common())

    @property
    def quantization(self) -> str | None:
        """The method of quantization that the config states."""
        return _quantization(self.config)

    def size(self, name: str) -> int:
        """How many values a tensor has."""
        return math.prod(self.shape(name))

    def lacks(self, name: str) -> str:
        """The beginning of a sentence on a tensor that is not there."""
        if name not in self.absent:
            return f"{self.path} has no tensor {name}"
        file = file_in(self.path, self.absent[name])
        there = "does not hold it" if os.path.exists(file) else "is missing"
        return f"{self.path} has no tensor {name} (the index lists it in {file}, which {there})"

    def stored_tensors(self) -> Iterable[StoredTensor]:
        return self._tensors.values()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored(name).shape

    def stored_dtype(self, name: str) -> np.dtype:
        """What ``read`` gives (bf16 as ``ml_dtypes.bfloat16``)."""
        return DTYPES[self.stored(name).dtype]

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored dtype (bf16 as ``ml_dtypes.bfloat16``).

        Raises:
            UserError: there is no such tensor, or a value of it is infinite or no number.
        """
        return read_tensor(name, self.stored(name))

    def read_row(self, name: str, index: int) -> np.ndarray:
        """Slice ``index`` of the first dimension; reads no more than that."""
        stored = self.stored(name)
        if not stored.shape or not 0 <= index < stored.shape[0]:
            raise UserError(f"{name} has shape {list(stored.shape)}, so no slice {index}; check the checkpoint's config.json", 2)
        return read_tensor(name, stored, index)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and every tensor's name, dtype, shape and first and last 4 KiB, by sorted name."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for name in self.names:
            tensor = self._tensors[name]
            digest.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(read_ends(tensor, SAMPLE))
        return digest.hexdigest()

    @property
    def version(self) -> str:
        """sha256 over the shards' sizes and times: changes with any change of a shard, and when the checkpoint is copied."""
        stats = [(file, file.stat()) for file in self.files]
        return hashlib.sha256(repr([(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in stats]).encode()).hexdigest()

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor lies, and how.

        Raises:
            UserError: there is no such tensor.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise UserError(f"{self.lacks(name)}; add the file that holds it", 2) from None


def _quantization(config: dict[str, Any]) -> str | None:
    key = next((key for key in QUANTIZATION if config.get(key)), None)
    if key is None:
        return None
    method = config[key].get("quant_method") if isinstance(config[key], dict) else None
    return f"{key}: {method if isinstance(method, str) and method.isprintable() else 'unknown'}"


def _left_over(path: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> list[str]:
    """A remark on what the config says of a quantization, where the tensors have none.

    Raises:
        UserError: they have.
    """
    named = _quantization(config)
    if named is None:
        return []
    for name, tensor in tensors.items():
        if SCALES.search(name) or (tensor.dtype not in (*FLOATS, "F64") and math.prod(tensor.shape) > 1):
            raise UserError(f"{path} is quantized ({named}): it has {name} in {tensor.dtype}; dequantize it to bf16 first", 2)
    return [f"config.json speaks of a quantization ({named}) that no tensor has: the weights are used as they are stored"]
