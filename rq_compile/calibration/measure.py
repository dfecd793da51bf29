"""Measure the experts of one layer on its recorded inputs: output error per format, Wanda score, activation statistics.

This module is independent of the source of inputs and weights, so that a model larger than memory can be measured layer by layer
with the same function.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from threading import local

import numpy as np
import torch

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.architectures.layers import ExpertWeights
from rq_compile.calibration.constant import constant_error
from rq_compile.calibration.expert import StoredExpert, cast_error, expert_outputs, in_format, in_fp32, weight_squares
from rq_compile.calibration.schema import LayerSums
from rq_compile.calibration.scratch import release
from rq_compile.calibration.side_by_side import OrderedSum, side_by_side
from rq_compile.calibration.wanda import WANDA_FRACTION, wanda_score
from rq_compile.processes import world
from rq_compile.quantization.formats import COMPUTED_FORMATS, FLOAT_FORMATS, SLOT_FORMATS, Format, Quantizer, block_size
from rq_compile.quantization.second_moment import SecondMoment, whole_moment

# An expert's error is measured on at most this many of its pairs. On samples/olmoe that is within 3 % (median; 95 %: 10 %) of the
# error on all of them; 256 are within 2 % (6 %). Other text of the same kinds changes it by more (docs/calibration.md).
MAX_PAIRS = 128
# Tokens of an expert that are run at a time.
ROWS_AT_ONCE = 1024
# The square of fp32's rounding: smaller changes of the weights change the outputs by less than computing them in fp32 does.
ROUNDING = 2.0**-48


@dataclass(frozen=True)
class ExpertMeasurement:
    """Sums over the (token, choice) pairs of one expert E.

    ``energy``: ``gate**2 * ||E(x)||**2``. ``error[format]``: ``gate**2 * ||E_format(x) - E(x)||**2``, infinite where the format
    cannot hold a weight. ``squared_gates``: ``gate**2``. ``weighted_output [hidden]``: ``gate**2 * E(x)``. Beside the sums,
    ``weight_error[format]`` (see ``weight_error``), ``wanda`` (see ``wanda_score``) and ``intermediate_moment``, that of the down
    projection's inputs by blocks of columns.
    """

    pairs: int
    energy: float
    error: dict[Format, float]
    weight_error: dict[Format, float]
    wanda: float
    intermediate_moment: np.ndarray
    squared_gates: float
    weighted_output: np.ndarray


@dataclass(frozen=True)
class LayerMeasurement:
    """The measurements of a layer's m experts, stacked: ``[m]`` float64 (``pairs`` int64), ``weighted_outputs [m, hidden]``
    float64; the moments ``[m, ...]`` fp32.

    ``input_moment``: of the up projections' inputs, over all tokens of the layer. ``output_square``: squared norm of the summed
    outputs of the routed experts for a token, summed over the tokens.
    """

    pairs: np.ndarray
    energy: np.ndarray
    error: dict[Format, np.ndarray]
    weight_error: dict[Format, np.ndarray]
    wanda: np.ndarray
    input_moment: SecondMoment
    intermediate_moments: np.ndarray
    squared_gates: np.ndarray
    weighted_outputs: np.ndarray
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
            intermediate_moments=np.stack([expert.intermediate_moment for expert in experts]),
            squared_gates=np.array([expert.squared_gates for expert in experts]),
            weighted_outputs=np.stack([expert.weighted_output for expert in experts]),
            output_square=output_square,
        )

    def scaled(self, pairs: np.ndarray, tokens: float) -> "LayerMeasurement":
        """The sums expected over all tokens, if those measured were a sample of them.

        ``pairs`` int64 ``[m]`` over all tokens; ``tokens`` is their number over that of the measured ones.
        """
        scale = np.where(self.pairs > 0, pairs / np.maximum(self.pairs, 1), 1)
        return replace(
            self,
            energy=self.energy * scale,
            error={format: np.where(np.isinf(error), error, error * scale) for format, error in self.error.items()},
            wanda=self.wanda * np.sqrt(scale),
            input_moment=SecondMoment(self.input_moment.values * np.float32(tokens)) if tokens != 1 else self.input_moment,
            intermediate_moments=_scaled(self.intermediate_moments, scale),
            squared_gates=self.squared_gates * scale,
            weighted_outputs=self.weighted_outputs * scale[:, None],
            output_square=self.output_square * tokens,
        )

    @property
    def sums(self) -> LayerSums:
        """The sums for a document, rounded to the digits that are significant in sums of fp32 values."""

        def digits(values: np.ndarray) -> list[float]:
            return [float(f"{value:.9g}") for value in values]

        return LayerSums(
            pairs=self.pairs.tolist(),
            energy=digits(self.energy),
            error={format: digits(error) for format, error in self.error.items()},
            weight_error={format: digits(error) for format, error in self.weight_error.items()},
            output_square=self.output_square,
        )


def _scaled(moments: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return moments if (scale == 1).all() else moments * scale.astype(np.float32)[:, None, None, None]


def measure_layer(
    geometry: ExpertGeometry,
    hidden: np.ndarray,
    ids: np.ndarray,
    gates: np.ndarray,
    weights_of: Callable[[int], ExpertWeights],
    *,
    output: np.ndarray | None = None,
    formats: tuple[Format, ...] = COMPUTED_FORMATS,
    quantizer: Quantizer = "gptq",
    wanda_fraction: float = WANDA_FRACTION,
    device: str = "cpu",
    first: Callable[[], None] = lambda: None,
) -> LayerMeasurement:
    """Run every expert over its own tokens, as the checkpoint has it and as each format stores it, rounded by ``quantizer``.

    ``hidden [T, hidden]`` fp32, ``ids [T, k]`` in ``0..m-1``, ``gates [T, k]`` fp32. ``weights_of(e)`` gives expert e; it is
    called once an expert, in the order in which they are taken, while experts before are measured. What the experts give
    together for every token is added to ``output [T, hidden]`` float64, zeros at first, in that order. ``hidden`` and ``output``
    may be mapped from disk. Held at a time: the weights of ``AT_ONCE`` experts (``side_by_side``), in fp32 and rounded, and of
    one other as ``weights_of`` gives it; outputs as large as the weights of ``AT_ONCE + 1`` experts; and the inputs and
    outputs of some tokens. ``device`` is the torch device of the products; the CPU rounds.

    One process takes the experts by number. Every process of a larger world is given all tokens, and returns the measurements of
    all experts; whoever has time takes the next, from the one with the most tokens on. ``first`` is called before a process
    takes experts, and exchanges nothing: a process that has other work to do there takes fewer. ``output`` is in float64 so that
    its fp32 digits do not depend on the order in which experts are added.
    """
    output = np.zeros(hidden.shape, np.float64) if output is None else output
    input_moment = whole_moment(hidden)
    by_expert = np.argsort(ids, axis=None, kind="stable")
    starts = np.searchsorted(ids.ravel()[by_expert], np.arange(geometry.experts + 1))
    measure = _Measure(geometry, hidden, OrderedSum(output), formats, wanda_fraction, device)
    in_turn = np.argsort(-np.diff(starts), kind="stable") if world().size > 1 else np.arange(geometry.experts)
    own: list[int] = []
    block = block_size(geometry.intermediate)
    # One array for all experts. The allocator could not use again the room of large temporary arrays if small ones that stay
    # until the end of the layer lay between them.
    products = np.zeros((geometry.experts, -(-geometry.intermediate // block), block, block), np.float32)

    def jobs() -> Iterator[Callable[[], ExpertMeasurement]]:
        for number, place in enumerate(world().taken(geometry.experts)):
            expert = int(in_turn[place])
            own.append(expert)
            pairs = by_expert[starts[expert] : starts[expert + 1]]
            weights = weights_of(expert)
            if quantizer == "gptq":
                weights = replace(weights, up_moment=input_moment)
            yield partial(measure.expert, number, weights, pairs // ids.shape[1], gates.ravel()[pairs], products[expert])

    first()
    results = list(side_by_side(jobs()))  # no process waits for another before it has measured all its experts
    measured = dict(zip(own, results, strict=True))
    experts = list(world().all(world().takers(own), (measured[expert] for expert in sorted(own))))
    return LayerMeasurement.of(experts, input_moment, _square(world().sum(output, device)))


@dataclass(frozen=True)
class _Run:
    """What running an expert on its tokens showed: its weights in fp32, ``original``, and the formats in which they are
    ``exact``; the number of ``pairs``; ``products``: see ``expert_outputs``; ``squares [hidden]`` of its inputs; the sums of
    ``ExpertMeasurement``; and what ``on_sample`` of the pairs tells."""

    original: ExpertWeights
    exact: frozenset[Format]
    pairs: int
    energy: float
    products: np.ndarray
    squares: np.ndarray
    squared_gates: float
    weighted_output: np.ndarray
    on_sample: "_OnSample"


@dataclass(frozen=True)
class _Measure:
    """Measures the experts of a layer, with the arguments of ``measure_layer``."""

    geometry: ExpertGeometry
    hidden: np.ndarray
    output: OrderedSum
    formats: tuple[Format, ...]
    wanda_fraction: float
    device: str
    # Of each thread: an expert whose matrices are overwritten with the original ones. Arrays of their own would each be new
    # memory for the system to clear.
    _room: local = field(default_factory=local, init=False, repr=False)

    def expert(
        self, number: int, weights: ExpertWeights, tokens: np.ndarray, gate: np.ndarray, products: np.ndarray
    ) -> ExpertMeasurement:
        """Measure one of the experts that have numbers 0, 1, ..., in this order, on the pairs of ``tokens [n]``, by number, and
        ``gate [n]``; from several threads. ``products``: zeros, see ``expert_outputs``."""
        held: list[tuple[np.ndarray, torch.Tensor]] = []
        try:
            run = self._run(number, weights, tokens, gate, products, held)
        finally:
            self.output.add(number, held, complete=True)
        return self._rounded(run)

    def _run(
        self,
        number: int,
        weights: ExpertWeights,
        tokens: np.ndarray,
        gate: np.ndarray,
        products: np.ndarray,
        held: list[tuple[np.ndarray, torch.Tensor]],
    ) -> _Run:
        """Run the expert as the checkpoint has it. Outputs that were not added yet are in ``held``."""
        geometry = self.geometry
        original = in_fp32(weights, self._of_thread(weights))
        squares, weighted = np.zeros(geometry.hidden, np.float64), np.zeros(geometry.hidden, np.float64)
        sample, shares = _sample(gate)
        sampled_x, sampled_y = [], []
        energy = 0.0
        for start in range(0, len(tokens), ROWS_AT_ONCE):
            some = tokens[start : start + ROWS_AT_ONCE]
            x = torch.from_numpy(self.hidden[some])
            y = expert_outputs(x.to(self.device), original, geometry, products).cpu()
            squares += x.square().sum(0).numpy()
            picked = sample[slice(*np.searchsorted(sample, (start, start + len(some))))] - start
            sampled_x.append(x[picked])
            sampled_y.append(y[picked])
            of_some = torch.from_numpy(gate[start : start + len(some)])
            y *= of_some[:, None]
            energy += _square(y.numpy())
            weighted += (of_some @ y).double().numpy()
            release(self.hidden)
            held.append((some, y))
            if len(held) * y.numel() > geometry.expert_weights:
                self.output.add(number, held, complete=False)
                held.clear()
        on_sample = _OnSample(sampled_x, sampled_y, shares, energy, self.device)
        squared_gates = float(np.square(gate, dtype=np.float64).sum())
        exact = _exact_in(weights)
        return _Run(original, exact, len(tokens), energy, products, squares, squared_gates, weighted, on_sample)

    def _of_thread(self, weights: ExpertWeights) -> ExpertWeights:
        """An expert with room for ``weights`` in fp32."""
        if not hasattr(self._room, "original"):
            up, down = (np.empty(matrix.shape, np.float32) for matrix in (weights.up, weights.down))
            self._room.original = replace(weights, up=up, down=down)
        room: ExpertWeights = self._room.original
        return room

    def _rounded(self, run: _Run) -> ExpertMeasurement:
        """Measure what each format changes."""
        geometry, original = self.geometry, run.original
        changed = original
        if original.up_moment is not None:
            changed = replace(original, down_moment=SecondMoment(run.products))
        weight_errors: dict[Format, float] = {}
        errors: dict[Format, float] = {}
        threads = torch.get_num_threads()
        squares = weight_squares(original, threads)
        for format in self.formats:
            if not SLOT_FORMATS[format].computed:
                weight_errors[format], errors[format] = 1.0, _constant_error(run)
                continue
            if format in run.exact:
                weight_errors[format] = errors[format] = 0.0
                continue
            if not SLOT_FORMATS[format].quantized and (error := cast_error(original, squares, format, threads)) < ROUNDING:
                weight_errors[format], errors[format] = error, error * run.energy
                continue
            stored, weight_errors[format] = in_format(changed, squares, format, geometry.block, threads=threads)
            errors[format] = run.on_sample.error(stored, weight_errors[format], geometry)
        norms = _diagonal(run.products)[: geometry.intermediate]
        matrices = [(original.up, run.squares.astype(np.float32)), (original.down, norms)]
        return ExpertMeasurement(
            pairs=run.pairs,
            energy=run.energy,
            error=errors,
            weight_error=weight_errors,
            wanda=wanda_score(matrices, self.wanda_fraction),
            intermediate_moment=run.products,
            squared_gates=run.squared_gates,
            weighted_output=run.weighted_output,
        )


def _constant_error(run: _Run) -> float:
    return float(constant_error(np.array([run.energy]), run.weighted_output[None], np.array([run.squared_gates]))[0])


class _OnSample:
    """A sample of an expert's pairs: inputs and outputs, by chunks, and the weight of each; ``energy`` is that of all pairs."""

    def __init__(self, x: list[torch.Tensor], y: list[torch.Tensor], shares: np.ndarray, energy: float, device: str) -> None:
        self._x, self._y = (torch.cat(chunks).to(device) if chunks else None for chunks in (x, y))
        self._shares, self._energy = shares, energy

    def error(self, changed: StoredExpert, weight_error: float, geometry: ExpertGeometry) -> float:
        """``ExpertMeasurement.error`` of an expert with the weights ``changed``, from its relative error on the sample."""
        if not self._energy or np.isinf(weight_error):
            return weight_error if np.isinf(weight_error) else 0.0
        if weight_error < ROUNDING:
            return weight_error * self._energy
        assert self._x is not None
        assert self._y is not None
        difference = expert_outputs(self._x, changed, geometry).sub_(self._y)
        error, whole = (float((_squares(rows) * self._shares).sum()) for rows in (difference, self._y))
        return self._energy * error / whole if whole > 0 else 0.0


def _exact_in(weights: ExpertWeights) -> frozenset[Format]:
    """The formats that hold ``weights`` in their dtype."""
    dtypes = {weights.up.dtype, weights.down.dtype}
    return frozenset(("fp32", *(name for name in FLOAT_FORMATS if dtypes == {SLOT_FORMATS[name].dtype})))


def _sample(gate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of at most ``MAX_PAIRS`` pairs, ascending, and the weight of the squared error of each, both ``[n]``.

    Either all pairs, with their squared gates; or, when the sum of the squared gates is divided into ``MAX_PAIRS`` equal parts,
    the pairs at the middle of each part.
    """
    weights = gate.astype(np.float64) ** 2
    if len(gate) <= MAX_PAIRS:
        return np.arange(len(gate)), weights
    sums = np.cumsum(weights)
    middles = (np.arange(MAX_PAIRS) + 0.5) / MAX_PAIRS * sums[-1]
    numbers, counts = np.unique(np.searchsorted(sums, middles, side="right"), return_counts=True)
    kept = numbers < len(gate)  # all squares 0
    return numbers[kept], counts[kept].astype(np.float64)


def _diagonal(products: np.ndarray) -> np.ndarray:
    return products.diagonal(axis1=1, axis2=2).reshape(-1)


def _squares(rows: torch.Tensor) -> np.ndarray:
    """Squared norms of ``rows [n, hidden]``, float64 ``[n]``."""
    return torch.linalg.vector_norm(rows, dim=1).double().square().cpu().numpy()


def _square(rows: np.ndarray) -> float:
    """Sum of squares of ``rows [n, hidden]``, which may be mapped from disk."""
    total = 0.0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        total += float(_squares(torch.from_numpy(np.asarray(rows[start : start + ROWS_AT_ONCE]))).sum())
        release(rows)
    return total
