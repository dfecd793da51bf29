"""A Hugging Face checkpoint folder, opened lazily: headers on opening, one tensor or slice at a time afterwards."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rq_compile.checkpoint.folder import checkpoint_below, file_in, read_json, refuse_links_outward, refuse_pointer
from rq_compile.checkpoint.other_folders import refuse_other_folders
from rq_compile.checkpoint.safetensors_file import StoredTensor, read_ends
from rq_compile.checkpoint.shards import stored_tensors
from rq_compile.checkpoint.storage.stated import Stated, stated_of
from rq_compile.checkpoint.storage.weight import BF16, Plain, Weight
from rq_compile.checkpoint.storage.weights import weights_of
from rq_compile.errors import UserError
from rq_compile.quantization.formats import Format
from rq_compile.quantization.source_numbers import SourceNumbers

SAMPLE = 4096
FLOATS: dict[np.dtype, Format] = {np.dtype(np.float32): "fp32", np.dtype(np.float16): "fp16", BF16: "bf16"}
# Files that repositories keep in git-lfs beside the weights.
SMALL_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """``config`` is the parsed ``config.json``, ``stated`` the checkpoint's statements about its quantization.

    Names, shapes and values of weights are those of a checkpoint that was never quantized: see ``storage``.

    ``absent``: tensors that the index lists but no file holds -> the file that the index names for them. ``remarks``: sentences
    about anything unusual in the files.

    All values of a checkpoint are read through ``read``, ``read_row``, ``source_numbers`` or ``mapped``.
    """

    path: Path
    config: dict[str, Any]
    stated: Stated
    _tensors: dict[str, StoredTensor] = field(repr=False)
    _weights: dict[str, Weight] = field(repr=False)
    absent: dict[str, str] = field(default_factory=dict, repr=False)
    remarks: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Read the config and the headers of all shards, but no weights.

        Raises:
            UserError: no such directory, a link that leads out of it, a folder of another kind (see ``refuse_other_folders``), no
                config.json, no safetensors files, a damaged shard (see ``stored_tensors``), or weights in an unsupported format
                (see ``weights_of``).
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"no such directory: {path}; give a local Hugging Face checkpoint directory", 2)
        refuse_links_outward(path)
        refuse_other_folders(path)
        if not (path / "config.json").exists() and (below := checkpoint_below(path)):
            raise UserError(f"{path} is not a checkpoint, but {below} is; give that one", 2)
        for file in (path / name for name in SMALL_FILES):
            refuse_pointer(file)
        config = read_json(path / "config.json")
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or not model_type.isprintable():
            raise UserError(f"{path / 'config.json'} does not name a model_type; give a Hugging Face checkpoint directory", 2)
        stated = stated_of(path, config)
        shards = stored_tensors(path, stated.method)
        weights = weights_of(shards.tensors, stated)
        remarks = [*shards.remarks, *_left_over(stated, weights)]
        return cls(path, config, stated, shards.tensors, weights, shards.absent, tuple(remarks))

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def names(self) -> list[str]:
        return sorted(self._weights)

    @cached_property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({tensor.file for tensor in self._tensors.values()})

    @cached_property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes of the tensors by dtype, as safetensors names it."""
        total: Counter[str] = Counter()
        for tensor in self._tensors.values():
            total[tensor.dtype] += tensor.bytes
        return dict(total.most_common())

    @cached_property
    def bytes_by_format(self) -> dict[str, int]:
        """Bytes of the weights by the name of their storage format."""
        total: Counter[str] = Counter()
        for weight in self._weights.values():
            total[weight.format] += weight.bytes
        return dict(total.most_common())

    @property
    def quantization(self) -> str | None:
        """The quantization method that the config states."""
        return self.stated.named

    def size(self, name: str) -> int:
        """The number of values of a weight."""
        return math.prod(self.shape(name))

    def lacks(self, name: str) -> str:
        """The beginning of a sentence about a missing tensor."""
        if name not in self.absent:
            return f"{self.path} has no tensor {name}"
        file = file_in(self.path, self.absent[name])
        there = "does not hold it" if os.path.exists(file) else "is missing"
        return f"{self.path} has no tensor {name} (the index lists it in {file}, which {there})"

    def weights(self) -> Iterable[Weight]:
        return self._weights.values()

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def weight(self, name: str) -> Weight:
        """A weight, and how it is stored.

        Raises:
            UserError: there is no such weight.
        """
        try:
            return self._weights[name]
        except KeyError:
            raise UserError(f"{self.lacks(name)}; add the file that holds it", 2) from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weight(name).shape

    def dtype_of(self, name: str) -> np.dtype:
        """The dtype that ``read`` returns: the stored dtype (bf16 as ``ml_dtypes.bfloat16``). For a quantized weight, bf16 if
        that holds every decoded value, otherwise fp32."""
        return self.weight(name).dtype

    def source_bytes(self, name: str) -> int:
        """Bytes in memory while a weight is read: its bytes as stored plus, if it is quantized, as decoded."""
        weight = self.weight(name)
        return weight.bytes + (0 if isinstance(weight, Plain) else 4 * math.prod(weight.shape))

    def read(self, name: str) -> np.ndarray:
        """The weight, decoded, in ``dtype_of`` it.

        Raises:
            UserError: there is no such weight, or one of its values is infinite or NaN.
        """
        return self.weight(name).read()

    def read_row(self, name: str, index: int) -> np.ndarray:
        """Slice ``index`` of the first dimension. Reads only this slice."""
        return self._with_row(name, index).read(index)

    def source_numbers(self, name: str, index: int | None = None) -> SourceNumbers | None:
        """The numbers and scales of a quantized weight, or of its slice ``index``; None if it does not consist of such."""
        weight = self.weight(name) if index is None else self._with_row(name, index)
        return weight.source_numbers(weight.rows_of(index))

    def _with_row(self, name: str, index: int) -> Weight:
        weight = self.weight(name)
        if not weight.shape or not 0 <= index < weight.shape[0]:
            raise UserError(
                f"{name} has shape {list(weight.shape)}, which has no slice {index}; check the checkpoint's config.json", 2
            )
        return weight

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and, sorted by name, every tensor's name, dtype, shape and first and last 4 KiB."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        tensors = sorted(self._tensors.items(), key=lambda item: item[0])
        for (name, tensor), ends in zip(tensors, read_ends((tensor for _, tensor in tensors), SAMPLE), strict=True):
            digest.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(ends)
        return digest.hexdigest()

    @property
    def version(self) -> str:
        """sha256 over the shards' sizes and times. It changes with any change of a shard, and when the checkpoint is copied."""
        stats = [(file, file.stat()) for file in self.files]
        return hashlib.sha256(repr([(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in stats]).encode()).hexdigest()


def _left_over(stated: Stated, weights: dict[str, Weight]) -> list[str]:
    """A remark about a stated quantization, if no weight is quantized."""
    if stated.named is None or any(not isinstance(weight, Plain) for weight in weights.values()):
        return []
    said = f"{stated.file.name} states a quantization ({stated.named})"
    return [f"{said}, but no tensor is quantized: the weights are used as they are stored"]
