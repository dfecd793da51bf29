"""``calibration.json``: the measurements of a run of the model over text, by MoE layer and expert."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from rq_compile.architectures.dense_kinds import DenseKind
from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.bounds import MOST_COUNTED, MOST_LAYERS, Count, ExpertNumber, FilePath, LayerNumber, NonNegative, Sha256
from rq_compile.errors import UserError
from rq_compile.file_systems import readable
from rq_compile.files import Document, Name
from rq_compile.quantization.formats import Format, Quantizer
from rq_compile.versions import Upgrade, Versioned, same_keys


def _infinite(value: object) -> object:
    return math.inf if value is None else value


def _null(value: float) -> float | None:
    return None if math.isinf(value) else value


# JSON has no infinity, and strict readers refuse a file that contains one.
RelativeError = Annotated[
    float,
    Field(ge=0, allow_inf_nan=True),
    BeforeValidator(_infinite, json_schema_input_type=float | None),
    PlainSerializer(_null, when_used="json"),
]


class CalibrationText(Document):
    """One text file that was run: its name, content hash and tokens (without padding). ``weight``: how often each of its tokens
    counts in loads and errors (``merge.py``)."""

    name: Name
    sha256: Sha256
    tokens: Count
    weight: float = Field(default=1.0, gt=0)


class StatisticsFile(Document):
    """The safetensors file with a calibration's activation statistics (``statistics.py``). ``name`` is its path, relative to the
    folder of the document."""

    name: FilePath
    sha256: Sha256

    def named_from(self, folder: Path, document: Path) -> "StatisticsFile":
        """The same file, with its path relative to ``document`` instead of ``folder``.

        Raises:
            UserError: a folder between the two has a name that is not UTF-8, which JSON cannot hold.
        """
        path = Path(os.path.relpath(folder / self.name, document.parent)).as_posix()
        if readable(path) != path:
            raise UserError(
                f"{document} cannot name the statistics {readable(path)}, because JSON is UTF-8; write it beside them", 2
            )
        return self.model_copy(update={"name": path})


Sum = Annotated[float, Field(ge=0)]


class LayerSums(Document):
    """The sums from which the errors of a layer are computed, so that calibrations of different texts add up (``merge.py``).

    For each expert: ``pairs``, the number of (token, choice) pairs that were measured; ``energy``, the squared norm of gate times
    output, summed over all its pairs; ``error[format]``, the same for gate times the change of the output in ``format``; and
    ``weight_error[format]``, the relative squared change of its weights. ``output_square``: the squared norm of the summed output
    of the layer's experts, summed over its tokens; ``stream``: that of the hidden states behind the layer;
    ``inverse_stream``: the inverse of these squared norms, summed over the tokens.
    """

    pairs: list[Count]
    energy: list[Sum]
    error: dict[Format, list[RelativeError]]
    weight_error: dict[Format, list[RelativeError]]
    output_square: float = Field(gt=0)
    stream: float | None = Field(default=None, gt=0)
    inverse_stream: float | None = Field(default=None, gt=0)


class LayerCalibration(Document):
    """The measurements of one MoE layer.

    ``name``: the experts module's name in the transformers model (``model.layers.0.mlp.experts``). ``index``: its decoder layer.
    ``load[e]`` counts the (token, choice) pairs routed to expert e, with padding masked; the sum is tokens * top_k.
    ``text_loads[t]`` are the same counts for each calibration text, and ``batch_loads[b]`` for each batch. Weights of texts
    change ``load``, which is then rounded, but not ``text_loads`` and ``batch_loads``. ``dropped`` pairs
    exceeded an expert's capacity (Switch): they are part of the load, with a gate of 0, but the model does not compute them.
    ``wanda[e]`` is the paper's importance score; 0 if no token came.

    ``error[format][e]`` is the gate-weighted squared output error of expert e when it is stored in ``format``, summed over its
    calibration tokens, and divided by the squared norm of the summed output of the layer's routed experts, summed over all
    tokens. The errors of a plan's experts add up to the layer's relative error, because the errors of one token's experts point
    in unrelated directions. An error is 0 if the format holds the weights exactly, and infinite (null in the file) if it cannot
    hold a weight. ``estimated`` lists the experts with too few tokens for a measurement, whose errors are estimated instead. All
    errors follow from ``sums``, which are missing if the errors were not measured on these loads.

    ``stream_share`` is ``output_square / stream`` of the sums: an error times it is a relative change of the residual stream, the
    unit of ``DenseCalibration``. ``sensitivity`` is the mean square of the layer's output times the mean inverse square of the
    stream: the change of an average token's stream for an error of 1. Tokens with very large states, such as attention sinks,
    dominate ``stream``, but not ``inverse_stream``. Plans weight errors of layers by it.

    If the experts of the checkpoint are quantized, ``stored_as`` names the storage formats of the layer's experts, and
    ``stored_bytes`` is their size in the checkpoint, including scales and zero points.
    """

    name: str
    index: LayerNumber
    geometry: ExpertGeometry
    stored_as: list[str] | None = None
    stored_bytes: Count | None = None
    load: list[Count]
    text_loads: list[list[Count]] = Field(min_length=1)
    batch_loads: list[list[Count]] = Field(min_length=1)
    dropped: Count = 0
    wanda: list[NonNegative]
    error: dict[Format, list[RelativeError]]
    estimated: list[ExpertNumber] = Field(default=[])
    stream_share: float | None = Field(default=None, gt=0)
    sensitivity: float | None = Field(default=None, gt=0)
    sums: LayerSums | None = None

    @model_validator(mode="after")
    def has_a_value_of_every_expert(self) -> Self:
        experts = self.geometry.experts
        counted: dict[str, Sequence[Sequence[float]]] = {
            "load": [self.load],
            "text_loads": self.text_loads,
            "batch_loads": self.batch_loads,
            "wanda": [self.wanda],
        }
        if self.sums:
            counted |= {"pairs": [self.sums.pairs], "energy": [self.sums.energy]}
            counted |= {f"sums at {format}": [values] for format, values in self.sums.error.items()}
            counted |= {f"weight_error at {format}": [values] for format, values in self.sums.weight_error.items()}
            if not self.error.keys() == self.sums.error.keys() == self.sums.weight_error.keys():
                raise ValueError(f"layer {self.index} has errors and sums of different formats")
        for name, rows in (counted | {f"error at {format}": [values] for format, values in self.error.items()}).items():
            if wrong := [len(row) for row in rows if len(row) != experts]:
                raise ValueError(f"layer {self.index} has {experts} experts, but {wrong[0]} values of {name}")
        for name, rows in (("load", [self.load]), ("text_loads", self.text_loads), ("batch_loads", self.batch_loads)):
            if (total := max(map(sum, rows))) > MOST_COUNTED:
                raise ValueError(f"{name} of layer {self.index} adds up to {total}, more than 2^53")
        if beyond := [expert for expert in self.estimated if expert >= experts]:
            raise ValueError(f"layer {self.index} has {experts} experts, but estimated names expert {beyond[0]}")
        return self

    @property
    def tokens(self) -> int:
        """Number of tokens that this layer routed. In an encoder-decoder model, these are those of the encoder or of the
        decoder."""
        return sum(self.load) // self.geometry.top_k


class DenseMatrix(Document):
    """A non-expert matrix ``[rows, columns]``, by the name of its parameter, which the checkpoint stores in ``bits`` bits.
    ``moment``: the tensor of the statistics with the second moment of its input; matrices with one input share it."""

    name: str
    rows: int = Field(ge=1, le=MOST_COUNTED)
    columns: int = Field(ge=1, le=MOST_COUNTED)
    bits: int = Field(ge=1, le=64)
    moment: str | None = None


class DenseCalibration(Document):
    """A non-expert module (``architectures.dense_modules``), whose matrices are stored in one format.

    ``error[format]``: squared change of its output if its matrices are stored in ``format``, and ``square``: squared norm of the
    residual stream to which the output is added, both summed over the tokens. For the head, KL divergence of the logits in nats,
    and the number of tokens. Both kinds of ``relative_error`` are in nats per token (``calibration.dense``). All are sums, so
    that calibrations add up.
    """

    name: str
    kind: DenseKind
    index: LayerNumber | None = None
    matrices: list[DenseMatrix] = Field(min_length=1)
    error: dict[Format, Sum]
    square: float = Field(gt=0)

    def relative_error(self, format: Format) -> float:
        return self.error[format] / self.square


class OtherWeights(Document):
    """Bytes of the non-expert weights outside of all ``dense`` modules in an engine's weights file: with matrices in the bits of
    the checkpoint, or all in fp32."""

    stored: Count
    fp32: Count


class Calibration(Versioned):
    """``tokens``: number of counted tokens. ``measured_tokens``: number of evenly spread tokens on which errors, scores and
    statistics were measured, and then scaled up. These are all tokens, unless the recorded inputs would take too much disk space,
    and none if the loads were recorded by a server. ``padding_tokens`` are not part of any count.

    ``dtype``: the format that stores every expert without loss: the checkpoint's own, or the smallest one for a quantized
    checkpoint. ``wanda_fraction``: the paper's s; ``wanda`` is the mean over this fraction of an expert's weights, lowest scores
    first.

    ``quantizer``: the method that rounded the weights whose errors were measured, and that rounds the weights of engines.
    ``gptq`` uses the activation ``statistics`` beside this file, ``nearest`` needs none.
    """

    called: ClassVar[str] = "calibration"
    command: ClassVar[str] = "rq-compile calibrate"
    upgrades: ClassVar[dict[int, Upgrade]] = {1: same_keys}

    schema_version: Literal[2] = 2
    kind: Literal["calibration"] = "calibration"
    tool: str
    model: Name
    model_type: str
    fingerprint: Sha256
    tokenizer: Sha256 | None = Field(default=None, description="hash of the tokenizer.json")
    dtype: Format
    texts: list[CalibrationText] = Field(min_length=1)
    tokens: Count
    measured_tokens: Count
    padding_tokens: Count
    batch_size: int = Field(ge=1, le=2**20)
    sequence_length: int = Field(ge=1, le=2**24)
    wanda_fraction: float = Field(gt=0, le=1)
    data_free: bool = Field(default=False, description="no text was run: loads are uniform, errors come from the weights")
    quantizer: Quantizer
    statistics: StatisticsFile | None
    extra_layers: int = Field(
        default=0, ge=0, lt=MOST_LAYERS, description="number of multi-token-prediction layers, which are not calibrated"
    )
    layers: list[LayerCalibration] = Field(min_length=1)
    dense: list[DenseCalibration] = Field(
        default=[], description="non-expert modules; empty if they were not measured (older calibrations, encoder-decoders)"
    )
    other_weights: OtherWeights | None = None

    @model_validator(mode="after")
    def counts_every_layer_once_in_every_text(self) -> Self:
        check_each_once([(layer.name, layer.index) for layer in self.layers])
        formats = self.layers[0].error.keys()
        for layer in self.layers:
            if layer.error.keys() != formats:
                told, first = (", ".join(sorted(known)) or "no format" for known in (layer.error, formats))
                raise ValueError(f"layer {layer.index} was measured in {told}, but layer {self.layers[0].index} in {first}")
            if len(layer.text_loads) != len(self.texts):
                raise ValueError(
                    f"layer {layer.index} has loads of {len(layer.text_loads)} texts, but there are {len(self.texts)}"
                )
        return self


def check_each_once(layers: list[tuple[str, int]]) -> None:
    """``layers``: names and numbers.

    Raises:
        ValueError: a layer appears twice.
    """
    names, numbers = (Counter(part) for part in zip(*layers, strict=True))
    for name, index in layers:
        if names[name] > 1 or numbers[index] > 1:
            raise ValueError(f"layer {index} ({name}) appears twice")
