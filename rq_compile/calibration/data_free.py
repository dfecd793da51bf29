"""A calibration without text: a format's errors estimated from the weights alone, with equal loads for all experts.

The relative change of an expert's output is about that of its weights, and each expert is assumed to contribute the same share of
its layer's output: ``error[format][e]`` is the relative squared change of its weights divided by the number of experts. Weights
are rounded to the nearest, since there are no inputs for GPTQ; ``wanda`` scores weights by their magnitude.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from rq_compile import __version__
from rq_compile.architectures.layers import ExpertWeights, MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import formats_to_measure, layers_to_measure, legible, lossless_format, stored_layer
from rq_compile.calibration.expert import in_format, in_fp32, weight_squares
from rq_compile.calibration.schema import Calibration, CalibrationText, LayerCalibration
from rq_compile.calibration.wanda import WANDA_FRACTION, wanda_score
from rq_compile.errors import UserError
from rq_compile.quantization.formats import MEASURED_FORMATS, SLOT_FORMATS, Block, Format
from rq_compile.standalone.limits import default_threads

NO_TEXT = "no text"


def check_formats(formats: Sequence[Format]) -> None:
    """
    Raises:
        UserError: one of the formats needs the outputs of experts.
    """
    if other := [format for format in formats if not SLOT_FORMATS[format].computed]:
        raise UserError(f"--data-free measures no outputs for {other[0]}; leave it out of --formats, or calibrate on text", 2)


def data_free(
    model: Model,
    *,
    progress: Callable[[int, int], None],
    block: Block | None = None,
    formats: Sequence[Format] = MEASURED_FORMATS,
    wanda_fraction: float = WANDA_FRACTION,
) -> Calibration:
    """Read every expert once and measure how much each format changes it. The loads are those of one token per expert, each sent
    to ``top_k`` experts. ``progress(done, total)`` counts experts; for the other arguments see ``calibrate``.

    Raises:
        UserError: a weight is not a finite number, or a format needs text.
    """
    check_formats(formats)
    layers = layers_to_measure(model, block)
    measured_formats = formats_to_measure(model, layers, formats)
    total = sum(layer.geometry.experts for layer in layers)
    done = 0
    measured = []
    for layer in layers:
        experts = []
        for expert in _experts(model, layer, measured_formats, wanda_fraction):
            experts.append(expert)
            done += 1
            progress(done, total)
        measured.append(_layer(model, layer, measured_formats, experts))
    tokens = max(layer.geometry.experts for layer in layers)
    return Calibration(
        tool=f"rq-compile {__version__}",
        model=model.name,
        model_type=model.model_type,
        fingerprint=model.fingerprint,
        dtype=lossless_format(model, measured),
        texts=[CalibrationText(name=NO_TEXT, sha256=hashlib.sha256(b"").hexdigest(), tokens=tokens)],
        tokens=tokens,
        measured_tokens=0,
        padding_tokens=0,
        batch_size=1,
        sequence_length=tokens,
        wanda_fraction=wanda_fraction,
        quantizer="nearest",
        statistics=None,
        data_free=True,
        extra_layers=model.extra_layers,
        layers=measured,
    )


def _experts(
    model: Model, layer: MoeLayer, formats: tuple[Format, ...], wanda_fraction: float
) -> Iterator[tuple[list[float], float]]:
    """For each expert, in order: the relative squared change of its weights in each format, and its score."""
    threads = default_threads()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, layer.geometry.experts, threads):
            some = range(start, min(start + threads, layer.geometry.experts))
            yield from pool.map(partial(_measured, model, layer, formats, wanda_fraction), some)


def _measured(
    model: Model, layer: MoeLayer, formats: tuple[Format, ...], wanda_fraction: float, expert: int
) -> tuple[list[float], float]:
    weights: ExpertWeights = model.expert(layer, expert)
    original = in_fp32(weights)
    squares = weight_squares(original)
    errors = [in_format(original, squares, format, layer.geometry.block)[1] for format in formats]
    matrices = [(matrix, np.ones(matrix.shape[1], np.float32)) for matrix in (original.up, original.down)]
    return errors, wanda_score(matrices, wanda_fraction)


def _layer(
    model: Model, layer: MoeLayer, formats: tuple[Format, ...], experts: list[tuple[list[float], float]]
) -> LayerCalibration:
    count = layer.geometry.experts
    load = [layer.geometry.top_k] * count
    return LayerCalibration(
        name=layer.name,
        index=layer.index,
        geometry=layer.geometry,
        load=load,
        text_loads=[load],
        batch_loads=[load],
        **stored_layer(model, layer),
        wanda=legible(np.array([score for _, score in experts])),
        error={
            format: legible(np.array([errors[number] for errors, _ in experts]) / count) for number, format in enumerate(formats)
        },
        estimated=list(range(count)),
    )
