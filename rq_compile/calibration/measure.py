"""Measure the experts of one layer on its recorded inputs: output error per format, Wanda score, activation statistics.

Nothing here knows where inputs and weights come from, so that a model larger than memory can be measured layer by layer with
the same function.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.architectures.layers import ExpertWeights
from rq_compile.calibration.expert import expert_outputs, in_format, weight_error
from rq_compile.calibration.wanda import WANDA_FRACTION, wanda_score
from rq_compile.quantization.formats import FORMATS, Format, Quantizer, block_size
from rq_compile.quantization.second_moment import SecondMoment, whole_moment

# An expert's error is measured on at most this many of its pairs, evenly spread. On an early samples/olmoe, rounded to
# the nearest, that was within 0.3 % (median; 95 %: 2.5 %) of the error on all of them.
MAX_PAIRS = 2048
# The square of fp32's rounding: what changes weights by less changes outputs by less than computing them in fp32 does.
ROUNDING = 2.0**-48


@dataclass(frozen=True)
class ExpertMeasurement:
    """Sums over the (token, choice) pairs of one expert E.

    ``energy``: ``gate**2 * ||E(x)||**2``. ``error[format]``: ``gate**2 * ||E_format(x) - E(x)||**2``, infinite where the format
    cannot hold a weight. Beside the sums, ``weight_error[format]`` (see ``weight_error``), ``wanda`` (see ``wanda_score``) and
    ``intermediate_moment``, that of the down projection's inputs by blocks of columns.
    """

    pairs: int
    energy: float
    error: dict[Format, float]
    weight_error: dict[Format, float]
    wanda: float
    intermediate_moment: SecondMoment


@dataclass(frozen=True)
class LayerMeasurement:
    """The measurements of a layer's m experts, stacked: ``[m]`` float64 (``pairs`` int64); the moments ``[m, ...]`` fp32.

    ``input_moment``: of the up projections' inputs, over all tokens of the layer. ``output_square``: squared norm of what the
    routed experts give together for a token, summed over the tokens.
    """

    pairs: np.ndarray
    energy: np.ndarray
    error: dict[Format, np.ndarray]
    weight_error: dict[Format, np.ndarray]
    wanda: np.ndarray
    input_moment: SecondMoment
    intermediate_moments: np.ndarray
    output_square: float

    @classmethod
    def of(cls, experts: list[ExpertMeasurement], input_moment: SecondMoment, output_square: float) -> "LayerMeasurement":
        return cls(
            pairs=np.array([expert.pairs for expert in experts]),
            energy=np.array([expert.energy for expert in experts]),
            error={format: np.array([expert.error[format] for expert in experts]) for format in experts[0].error},
            weight_error={format: np.array([expert.weight_error[format] for expert in experts]) for format in experts[0].error},
            wanda=np.array([expert.wanda for expert in experts]),
            input_moment=input_moment,
            intermediate_moments=np.stack([expert.intermediate_moment.values for expert in experts]),
            output_square=output_square,
        )

    def scaled(self, pairs: np.ndarray, tokens: float) -> "LayerMeasurement":
        """The sums expected over all tokens, when those measured were a sample of them.

        ``pairs`` int64 ``[m]`` over all tokens; ``tokens`` is their number over that of the measured ones.
        """
        scale = np.where(self.pairs > 0, pairs / np.maximum(self.pairs, 1), 1)
        return replace(
            self,
            energy=self.energy * scale,
            error={format: np.where(np.isinf(error), error, error * scale) for format, error in self.error.items()},
            wanda=self.wanda * np.sqrt(scale),
            output_square=self.output_square * tokens,
        )


def measure_layer(
    geometry: ExpertGeometry,
    hidden: np.ndarray,
    ids: np.ndarray,
    gates: np.ndarray,
    weights_of: Callable[[int], ExpertWeights],
    *,
    formats: tuple[Format, ...] = FORMATS,
    quantizer: Quantizer = "gptq",
    wanda_fraction: float = WANDA_FRACTION,
) -> LayerMeasurement:
    """Run every expert over its own tokens, as the checkpoint has it and as each format stores it, rounded by ``quantizer``.

    ``hidden [T, hidden]`` fp32 (may be mapped from disk), ``ids [T, k]`` in ``0..m-1``, ``gates [T, k]`` fp32. ``weights_of(e)``
    gives expert e; it is called once an expert, in order. Held at a time, in fp32: the weights of one expert twice, the inputs
    and outputs of its tokens, and the layer's output.
    """
    output = torch.zeros(hidden.shape)
    input_moment = whole_moment(hidden)
    experts = []
    for expert in range(geometry.experts):
        tokens, choices = np.nonzero(ids == expert)
        x, gate = torch.from_numpy(hidden[tokens]), torch.from_numpy(gates[tokens, choices])
        weights = weights_of(expert)
        if quantizer == "gptq":
            weights = replace(weights, up_moment=input_moment)
        measurement, y = _measure_expert(geometry, weights, x, gate, formats, wanda_fraction)
        experts.append(measurement)
        output.index_add_(0, torch.from_numpy(tokens), y.mul_(gate[:, None]))
    return LayerMeasurement.of(experts, input_moment, _gated_square(output, torch.ones(len(output))))


def _measure_expert(
    geometry: ExpertGeometry,
    weights: ExpertWeights,
    x: torch.Tensor,
    gate: torch.Tensor,
    formats: tuple[Format, ...],
    wanda_fraction: float,
) -> tuple[ExpertMeasurement, torch.Tensor]:
    """The measurement on ``x [n, hidden]`` and ``gate [n]``, and the expert's outputs ``[n, hidden]``, not yet gated."""
    original = in_format(weights, "fp32")
    block = block_size(geometry.intermediate)
    products = np.zeros((-(-geometry.intermediate // block), block, block), np.float32)
    y = expert_outputs(x, original, geometry, products)
    intermediate_moment = SecondMoment(products / np.float32(max(1, len(x))))
    if weights.up_moment is not None:
        weights = replace(weights, down_moment=intermediate_moment)
    intermediate_square_sum = products.diagonal(axis1=1, axis2=2).reshape(-1)[: geometry.intermediate]
    energy = _gated_square(y, gate)
    sample = torch.arange(len(x)) if len(x) <= MAX_PAIRS else torch.arange(MAX_PAIRS) * len(x) // MAX_PAIRS
    sampled_x, sampled_y, sampled_gate = x[sample], y[sample], gate[sample]
    weight_errors, errors = {}, {}
    for format in formats:
        changed = in_format(weights, format, geometry.block)
        weight_errors[format] = weight_error(changed, original)
        if np.isinf(weight_errors[format]):
            errors[format] = np.inf
        elif weight_errors[format] < ROUNDING:
            errors[format] = weight_errors[format] * energy
        else:
            difference = expert_outputs(sampled_x, changed, geometry).sub_(sampled_y)
            errors[format] = _gated_square(difference, sampled_gate)
            if len(sample) < len(x) and errors[format] > 0:
                errors[format] *= energy / _gated_square(sampled_y, sampled_gate)
    return ExpertMeasurement(
        pairs=len(x),
        energy=energy,
        error=errors,
        weight_error=weight_errors,
        wanda=wanda_score([(original.up, x.square().sum(0).numpy()), (original.down, intermediate_square_sum)], wanda_fraction),
        intermediate_moment=intermediate_moment,
    ), y


def _gated_square(rows: torch.Tensor, gate: torch.Tensor) -> float:
    """Sum of ``gate**2 * ||row||**2`` over ``rows [n, hidden]`` and ``gate [n]``."""
    return float((gate * torch.linalg.vector_norm(rows, dim=1)).double().square().sum())
