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
from rq_compile.quantization.source_integers import SourceIntegers

SAMPLE = 4096
FLOATS: dict[np.dtype, Format] = {np.dtype(np.float32): "fp32", np.dtype(np.float16): "fp16", BF16: "bf16"}
# Those that repositories keep in git-lfs beside the weights.
SMALL_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """``config`` is the parsed ``config.json``, ``stated`` what the checkpoint says about its quantization.

    Tensors are named, shaped and read as if the checkpoint had never been quantized: see ``storage``.

    ``absent`` are tensors that the index lists and no file holds -> the file that it names for them; ``remarks`` are sentences on
    what is odd about the files.

    Every value that is read of a checkpoint goes through ``read``, ``read_row``, ``integers`` or ``mapped``.
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
        """Read the config and the headers of all shards; no weights.

        Raises:
            UserError: no such directory, a link that leads out of it, a folder of another kind (see ``refuse_other_folders``), no
                config.json, no safetensors, a shard that is damaged (see ``stored_tensors``), or weights that are stored in a
                format that is not read (see ``weights_of``).
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
            raise UserError(f"{path / 'config.json'} names no model_type; give a Hugging Face checkpoint directory", 2)
        stated, shards = stated_of(path, config), stored_tensors(path)
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
        """Bytes of the tensors by safetensors' name of their dtype."""
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
        """The method of quantization that the config states."""
        return self.stated.named

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
        """What ``read`` gives: the stored dtype (bf16 as ``ml_dtypes.bfloat16``); of a quantized weight bf16 where that holds
        every decoded value, else fp32."""
        return self.weight(name).dtype

    def source_bytes(self, name: str) -> int:
        """What reading a weight holds: its bytes as stored and, of a quantized one, as decoded."""
        weight = self.weight(name)
        return weight.bytes + (0 if isinstance(weight, Plain) else 4 * math.prod(weight.shape))

    def read(self, name: str) -> np.ndarray:
        """The weight, decoded, in ``dtype_of`` it.

        Raises:
            UserError: there is no such weight, or a value of it is infinite or no number.
        """
        return self.weight(name).read()

    def read_row(self, name: str, index: int) -> np.ndarray:
        """Slice ``index`` of the first dimension; reads no more than that."""
        return self._with_row(name, index).read(index)

    def integers(self, name: str, index: int | None = None) -> SourceIntegers | None:
        """The whole numbers and scales that a quantized weight (or its slice ``index``) consists of; None where it does not."""
        weight = self.weight(name) if index is None else self._with_row(name, index)
        return weight.integers(weight.rows_of(index))

    def _with_row(self, name: str, index: int) -> Weight:
        weight = self.weight(name)
        if not weight.shape or not 0 <= index < weight.shape[0]:
            raise UserError(f"{name} has shape {list(weight.shape)}, so no slice {index}; check the checkpoint's config.json", 2)
        return weight

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and every tensor's name, dtype, shape and first and last 4 KiB, by sorted name."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for name in sorted(self._tensors):
            tensor = self._tensors[name]
            digest.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(read_ends(tensor, SAMPLE))
        return digest.hexdigest()

    @property
    def version(self) -> str:
        """sha256 over the shards' sizes and times: changes with any change of a shard, and when the checkpoint is copied."""
        stats = [(file, file.stat()) for file in self.files]
        return hashlib.sha256(repr([(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in stats]).encode()).hexdigest()


def _left_over(stated: Stated, weights: dict[str, Weight]) -> list[str]:
    """A remark on what is said of a quantization, where no weight has one."""
    if stated.named is None or any(not isinstance(weight, Plain) for weight in weights.values()):
        return []
    said = f"{stated.file.name} speaks of a quantization ({stated.named})"
    return [f"{said} that no tensor has: the weights are used as they are stored"]
