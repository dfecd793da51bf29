"""The activation statistics of a calibration, read one layer or expert at a time while an engine's weights are quantized.

The fp32 tensors are ``{layer name}.input_moment [hidden, hidden]``, the sum of ``x x^T`` over all tokens of the layer, and
``{layer name}.intermediate_moment [m, blocks, block, block]``, the same for the inputs of each expert's down projection, within
blocks of up to 128 columns. One moment serves all up projections of a layer. Moments of down projections are kept only within
blocks, because whole moments of every expert would be as large as the experts. ``{layer name}.weighted_output [m, hidden]`` and
``{layer name}.squared_gates [m]`` are the sums of ``gate**2 * E(x)`` and of ``gate**2`` over the pairs of each expert E, if
``constant`` was measured (see ``constant.py``). ``{matrix}.input_moment`` are those of non-expert matrices, whole or within
blocks of 128 columns; matrices with the same input share one (``schema.DenseMatrix``). (Calibrations of schema version 1 have
means. For a quantizer, which only uses proportions, there is no difference.)
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np

from rq_compile.calibration.constant import mean_outputs
from rq_compile.calibration.schema import Calibration, StatisticsFile
from rq_compile.calibration.scratch import release
from rq_compile.checkpoint.safetensors_file import read_tensor
from rq_compile.checkpoint.safetensors_file import tensors_of as stored_tensors
from rq_compile.errors import UserError
from rq_compile.files import sha256, write_document, written_beside
from rq_compile.processes import rank, world
from rq_compile.quantization.second_moment import SecondMoment

OUTPUTS, GATES = "weighted_output", "squared_gates"


class Tensors(Protocol):
    """The interface of a safetensors file."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """Raises KeyError or IndexError if there is no such tensor or slice."""
        ...


@dataclass(frozen=True)
class Statistics:
    """``tensors``: a file, from which tensors are read when needed; ``name`` is for messages, ``sha256`` the file's."""

    tensors: Tensors
    name: str
    sha256: str
    # Kept for the experts of two neighbouring layers, because the factor of their moment is expensive.
    _inputs: dict[str, SecondMoment] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def beside(cls, folder: Path, file: StatisticsFile) -> "Statistics":
        """The file that a document in ``folder`` names.

        Raises:
            UserError: it is missing, or is not the one that was written with the document.
        """
        path = folder / file.name
        if not path.is_file():
            raise UserError(f"the activation statistics {path} are missing; copy them there, or calibrate and plan again", 2)
        if sha256(path) != file.sha256:
            raise UserError(f"{path} is not the file that the plan was made with; copy that one, or plan again", 2)
        return cls(_OnDisk(path), str(path), file.sha256)

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> "Statistics | None":
        """Statistics that are not in a file; None if there are none."""
        if not tensors:
            return None
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensors[name]).data)
        return cls(_InMemory(tensors), "the calibration", digest.hexdigest())

    def input_moment(self, layer: str) -> SecondMoment:
        """The moment of the inputs of the up projections of ``layer``. May be called from several threads.

        Raises:
            UserError: the file is not the statistics of this model's calibration.
        """
        with self._lock:
            if layer not in self._inputs:
                for earlier in list(self._inputs)[:-1]:
                    del self._inputs[earlier]
                self._inputs[layer] = SecondMoment(self._read(layer, "input_moment"))
            return self._inputs[layer]

    def intermediate_moment(self, layer: str, expert: int) -> SecondMoment:
        """The moment of the inputs of the down projection of one expert.

        Raises:
            UserError: the file is not the statistics of this model's calibration.
        """
        return SecondMoment(self._read(layer, "intermediate_moment", expert))

    def intermediate_moments(self, layer: str) -> np.ndarray:
        """The moments of all experts of the layer, fp32 ``[m, blocks, block, block]``.

        Raises:
            UserError: the file is not the statistics of this model's calibration.
        """
        return self._read(layer, "intermediate_moment")

    def has_outputs(self, layer: str) -> bool:
        """Whether the mean outputs of the experts of ``layer`` were measured."""
        return f"{layer}.{OUTPUTS}" in self.tensors

    def mean_output(self, layer: str, expert: int) -> np.ndarray:
        """The mean of the expert's outputs, weighted by their squared gates, fp32 ``[hidden]``; zeros if no token reached it.

        Raises:
            UserError: the file is not the statistics of this model's calibration.
        """
        return mean_outputs(self._read(layer, OUTPUTS, expert)[None], self._read(layer, GATES)[expert, None])[0]

    def tensor(self, name: str) -> np.ndarray:
        """The moment of this name.

        Raises:
            UserError: the file is not the statistics of this model's calibration.
        """
        try:
            return self.tensors.read(name)
        except KeyError as error:
            raise UserError(f"{self.name} has no statistics {name}; copy the file that rq-compile calibrate wrote", 2) from error

    def _read(self, layer: str, moment: str, expert: int | None = None) -> np.ndarray:
        try:
            return self.tensors.read(f"{layer}.{moment}", expert)
        except (KeyError, IndexError) as error:
            of = layer if expert is None else f"expert {expert} of {layer}"
            raise UserError(f"{self.name} has no statistics of {of}; copy the file that rq-compile calibrate wrote", 2) from error


class _OnDisk:
    """Reads from the file, not from a memory map, so that the memory is freed again."""

    def __init__(self, path: Path) -> None:
        self._stored = stored_tensors(path)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        stored = self._stored[name]
        if index is not None and not 0 <= index < stored.shape[0]:
            raise IndexError(index)
        return read_tensor(name, stored, index)


class _InMemory:
    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        return self._tensors[name] if index is None else self._tensors[name][index]


def tensors_of(layer: str, input_moment: SecondMoment, intermediate_moments: np.ndarray) -> dict[str, np.ndarray]:
    """One layer's part of the file; ``intermediate_moments [m, blocks, block, block]``."""
    return {f"{layer}.input_moment": input_moment.values, f"{layer}.intermediate_moment": intermediate_moments}


def outputs_of(layer: str, weighted: np.ndarray, squared_gates: np.ndarray) -> dict[str, np.ndarray]:
    """One layer's sums of outputs, ``weighted [m, hidden]``, and of ``squared_gates [m]``."""
    tensors = {OUTPUTS: weighted, GATES: squared_gates}
    return {f"{layer}.{name}": values.astype(np.float32) for name, values in tensors.items()}


def write_statistics(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write the file that ``Statistics`` reads, one tensor after another, because they may be larger than memory."""
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (end, end + tensor.nbytes)}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).data)
            release(tensor)


def write_with_statistics(calibration: Calibration, tensors: dict[str, np.ndarray], output: Path) -> Calibration:
    """Write the statistics, if there are any, beside ``output``, and the calibration that names them. Returns this calibration.
    With several processes, only the first writes.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    if rank() > 0:
        return world().from_first(calibration)
    if tensors:
        path = output.with_suffix(".safetensors")
        with written_beside(path) as temporary:
            write_statistics(tensors, temporary)
        calibration = calibration.model_copy(update={"statistics": StatisticsFile(name=path.name, sha256=sha256(path))})
    write_document(calibration, output)
    return world().from_first(calibration)
