"""``calibration.json``: what a run of the model over text showed, per MoE layer and expert."""

import math
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.files import Document
from rq_compile.quantization.formats import Format, Quantizer


def _infinite(value: object) -> object:
    return math.inf if value is None else value


def _null(value: float) -> float | None:
    return None if math.isinf(value) else value


# JSON has no infinity: strict readers refuse a file with one.
RelativeError = Annotated[
    float, BeforeValidator(_infinite, json_schema_input_type=float | None), PlainSerializer(_null, when_used="json")
]


class CalibrationText(Document):
    """One text file that was run: its name, content hash and tokens (padding not counted)."""

    name: str
    sha256: str
    tokens: int


class StatisticsFile(Document):
    """The safetensors file with a calibration's activation statistics (``statistics.py``); ``name`` is its path from the folder
    of the document."""

    name: str
    sha256: str

    def named_from(self, folder: Path, document: Path) -> "StatisticsFile":
        """The same file, named so far from ``folder``, as it is named in ``document``."""
        path = os.path.relpath(folder / self.name, document.parent)
        return self.model_copy(update={"name": Path(path).as_posix()})


class LayerCalibration(Document):
    """What one MoE layer did.

    ``name`` is the experts module's name in the transformers model (``model.layers.0.mlp.experts``), ``index`` its
    decoder layer. ``load[e]`` counts the (token, choice) pairs routed to expert e, padding masked; the sum is tokens *
    top_k. ``text_loads[t]`` are the same counts for each calibration text alone and ``batch_loads[b]`` for each batch.
    ``dropped`` of the pairs came beyond an expert's capacity (Switch): they are part of the load, with a gate of 0, but the
    model does not compute them. ``wanda[e]`` is the paper's importance score, 0 where no token came.

    ``error[format][e]`` is the gate-weighted squared output error of expert e when stored in ``format``, summed over its
    calibration tokens and divided by the squared norm of what the layer's routed experts give together, summed over all
    tokens: the errors of a plan's experts add up to the layer's relative error (the squares of one token's experts do,
    as their errors point in unrelated directions). 0 where the format holds the weights exactly, infinite (in the file: null)
    where it cannot hold one. ``estimated`` lists the experts with too few tokens for a measurement, whose errors are estimated
    instead.
    """

    name: str
    index: int
    geometry: ExpertGeometry
    load: list[int]
    text_loads: list[list[int]]
    batch_loads: list[list[int]]
    dropped: int = 0
    wanda: list[float]
    error: dict[Format, list[RelativeError]]
    estimated: list[int] = Field(default=[])

    @property
    def tokens(self) -> int:
        """Tokens that this layer routed: the encoder's or the decoder's alone in an encoder-decoder model."""
        return sum(self.load) // self.geometry.top_k


class Calibration(Document):
    """``tokens`` were counted, on ``measured_tokens`` of them, evenly spread, errors, scores and statistics were measured and
    then scaled up: all, unless the recorded inputs had taken too much disk; none where loads that a server recorded took the
    place of those that were measured. ``padding_tokens`` are in no count at all.
    ``wanda_fraction`` is the paper's s: the part of an expert's weights, lowest scores first, that ``wanda`` is the mean of.

    ``quantizer`` rounded the weights whose errors were measured, and is to round those of an engine: ``gptq`` by the activation
    ``statistics`` beside this file, ``nearest`` without any.
    """

    schema_version: Literal[1] = 1
    kind: Literal["calibration"] = "calibration"
    tool: str
    model: str
    model_type: str
    fingerprint: str
    dtype: Format
    texts: list[CalibrationText]
    tokens: int
    measured_tokens: int
    padding_tokens: int
    batch_size: int
    sequence_length: int
    wanda_fraction: float = Field(gt=0, le=1)
    quantizer: Quantizer
    statistics: StatisticsFile | None
    layers: list[LayerCalibration] = Field(min_length=1)
