"""A Hugging Face checkpoint folder, opened lazily: headers on opening, one tensor or slice at a time afterwards."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rq_compile.checkpoint.folder import read_json, refuse_links_outward
from rq_compile.checkpoint.safetensors_file import DTYPES, StoredTensor, read_ends, read_tensor
from rq_compile.checkpoint.shards import stored_tensors
from rq_compile.errors import UserError
from rq_compile.quantization.formats import Format

SAMPLE = 4096
FLOATS: dict[str, Format] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class Checkpoint:
    """``config`` is the parsed ``config.json``. Tensors are named as in the files, see ``names``.

    Every value that is read of a checkpoint goes through ``read``, ``read_row`` or ``mapped``.
    """

    path: Path
    config: dict[str, Any]
    _tensors: dict[str, StoredTensor] = field(repr=False)

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Read the config and the headers of all shards; no weights.

        Raises:
            UserError: no such directory, a link that leads out of it, no config.json, no safetensors, a shard that is missing
                or damaged (see ``stored_tensors``), or the checkpoint is quantized.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"no such directory: {path}; give a local Hugging Face checkpoint directory", 2)
        refuse_links_outward(path)
        config = read_json(path / "config.json")
        model_type, quantization = config.get("model_type"), config.get("quantization_config")
        if not isinstance(model_type, str) or not model_type.isprintable():
            raise UserError(f"{path / 'config.json'} names no model_type; give a Hugging Face checkpoint directory", 2)
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            named = method if isinstance(method, str) and method.isprintable() else "unknown"
            raise UserError(f"{path} is quantized (quantization_config: {named}); dequantize it to bf16 first", 2)
        return cls(path, config, stored_tensors(path))

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
    def weights(self) -> int:
        """How many weights are stored."""
        return sum(math.prod(tensor.shape) for tensor in self._tensors.values())

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
    def dtype(self) -> Format:
        """The format that most bytes of the experts (of all tensors, where no name tells experts) are stored in."""
        total: Counter[str] = Counter()
        for tensor in [stored for name, stored in self._tensors.items() if "expert" in name] or self._tensors.values():
            total[tensor.dtype] += tensor.bytes
        stored_as = total.most_common(1)[0][0]
        if stored_as not in FLOATS:
            raise UserError(f"the weights of {self.path} are stored as {stored_as}; convert them to bf16, fp16 or fp32 first", 2)
        return FLOATS[stored_as]

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
            raise UserError(f"{self.path} has no tensor {name}; download the checkpoint again", 2) from None
