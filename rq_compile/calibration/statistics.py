"""The activation statistics of a calibration, read one layer or expert at a time while an engine's weights are quantized.

Tensors by name, fp32: ``{layer name}.input_moment [hidden, hidden]``, the mean of ``x x^T`` over all tokens of the layer, and
``{layer name}.intermediate_moment [m, blocks, block, block]``, that of each expert's inputs of the down projection, by
quantization blocks. One moment serves all up projections of a layer, and a down projection's is kept by blocks only: whole
moments of every expert would be as large as the experts.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from rq_compile.architectures.layers import ExpertWeights
from rq_compile.calibration.schema import StatisticsFile
from rq_compile.errors import UserError
from rq_compile.files import sha256
from rq_compile.quantization.second_moment import SecondMoment


class Tensors(Protocol):
    """What is asked of a safetensors file."""

    def get_tensor(self, name: str) -> np.ndarray: ...

    def get_slice(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Statistics:
    """``tensors``: a memory-mapped file, of which nothing is read before it is asked for; ``name`` is for messages."""

    tensors: Tensors
    name: str
    # Kept while the experts of one layer come by: the factor of their moment is the expensive part.
    _current: dict[str, SecondMoment] = field(default_factory=dict, repr=False)

    @classmethod
    def beside(cls, folder: Path, file: StatisticsFile) -> "Statistics":
        """The file that a document in ``folder`` names.

        Raises:
            UserError: it is missing, or not the one that was written with the document.
        """
        path = folder / file.name
        if not path.is_file():
            raise UserError(f"the activation statistics {path} are missing; copy them there, or calibrate and plan again", 2)
        if sha256(path) != file.sha256:
            raise UserError(f"{path} is not the file that the plan was made with; copy that one, or plan again", 2)
        try:
            return cls(safe_open(path, "numpy"), str(path))
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the activation statistics {path} ({error}); calibrate again", 2) from error

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> "Statistics | None":
        """Statistics that no file holds; None where there are none."""
        return cls(_InMemory(tensors), "the calibration") if tensors else None

    def with_moments(self, weights: ExpertWeights, layer: str, expert: int) -> ExpertWeights:
        """``weights`` of one expert, with the moments of its inputs.

        Raises:
            UserError: the file is not the statistics of this model's calibration.
        """
        try:
            down = self.tensors.get_slice(f"{layer}.intermediate_moment")[expert]
            up = self._current.get(layer) or SecondMoment(self.tensors.get_tensor(f"{layer}.input_moment"))
        except (SafetensorError, KeyError, IndexError) as error:
            raise UserError(
                f"{self.name} has no statistics of expert {expert} of {layer}; copy the file that rq-compile calibrate wrote", 2
            ) from error
        self._current.clear()
        self._current[layer] = up
        return replace(weights, up_moment=up, down_moment=SecondMoment(down))


class _InMemory(dict[str, np.ndarray]):
    get_tensor = get_slice = dict.__getitem__


def tensors_of(layer: str, input_moment: SecondMoment, intermediate_moments: np.ndarray) -> dict[str, np.ndarray]:
    """One layer's part of the file; ``intermediate_moments [m, blocks, block, block]``."""
    return {f"{layer}.input_moment": input_moment.values, f"{layer}.intermediate_moment": intermediate_moments}
