"""The input and the result of a policy."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median

import numpy as np

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.calibration.schema import Calibration, LayerCalibration
from rq_compile.planning.budget import allowed
from rq_compile.planning.costs import CostModel
from rq_compile.planning.demand import demand, drift_gain
from rq_compile.planning.dense import DenseItem, Whole
from rq_compile.planning.schema import Optimality, Slot, Target
from rq_compile.planning.targets import TARGETS
from rq_compile.quantization.formats import FEW_BITS, FORMATS, SLOT_FORMATS, Format

# No format but the checkpoint's own counts as exact: what cost nothing on the calibration text may cost something elsewhere.
# Far below any measured error, this only decides between equals, in favour of more bits.
LEAST_ERROR = 1e-9


def held_wider(target: Target) -> tuple[Format, ...]:
    """The formats that engines for ``target`` would store in more bits, so that a plan gains nothing by them."""
    return () if TARGETS[target].few_bits else FEW_BITS


@dataclass(frozen=True)
class Layer:
    """One MoE layer as the policies see it.

    ``demand`` float ``[texts, m]``: see ``demand.demand``. ``formats``: the possible formats of an expert, the checkpoint's own
    first. ``size`` int64 ``[F]``: bytes of an expert. ``error`` float ``[m, F]``: error of each format, inf if it is impossible.
    These are the calibration's times ``weight``, see ``error_weights``.
    """

    calibration: LayerCalibration
    demand: np.ndarray
    formats: tuple[Format, ...]
    size: np.ndarray
    error: np.ndarray
    weight: float = 1.0

    @property
    def geometry(self) -> ExpertGeometry:
        return self.calibration.geometry

    @property
    def experts(self) -> int:
        return self.geometry.experts

    @property
    def bytes_before(self) -> int:
        """Bytes of the layer's experts in the checkpoint."""
        return self.calibration.stored_bytes or self.experts * self.geometry.expert_bytes(self.formats[0])

    def worst_demand(self) -> np.ndarray:
        """float ``[m]``: every expert's load in the text that uses it most."""
        return self.demand.max(axis=0)

    def with_constants(self, constant: np.ndarray) -> "Layer":
        """The layer in which just the experts ``constant``, bool ``[m]``, are constant. They have no load, and the loads of the
        others are relative to their own mean."""
        of_constant = np.array([not SLOT_FORMATS[format].computed for format in self.formats])
        error = np.where(constant[:, None] == of_constant, self.error, np.inf)
        load = np.where(constant, 0.0, self.demand)
        mean = load.sum(axis=1, keepdims=True) / max(1, int((~constant).sum()))
        return replace(self, error=error, demand=load / np.where(mean > 0, mean, 1.0))

    def drift_gain(self, drift: float) -> np.ndarray:
        """float ``[m]``: the load that an expert may gain beyond its worst demand, see ``demand.drift_gain``."""
        return drift_gain(self.worst_demand(), drift, self.experts / self.geometry.top_k)


@dataclass(frozen=True)
class Problem:
    """A model's layers, the bytes that its experts may take, and the target of the plan.

    ``steps``: tokens of the steps that the plan is made for; the time of the first is predicted. ``whole``: the rest of the
    model, if the policy also chooses its formats; errors of experts are then in nats, as in ``DenseCalibration``.
    """

    layers: tuple[Layer, ...]
    dtype: Format
    memory: float
    cost: CostModel
    steps: tuple[int, ...]
    whole: Whole | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the step whose time is predicted."""
        return self.steps[0]

    @property
    def dense(self) -> tuple[DenseItem, ...]:
        return self.whole.modules if self.whole else ()

    @property
    def summed_layers(self) -> int:
        """By how many layers a sum of errors is divided: a plan for experts limits the mean error of a layer."""
        return 1 if self.whole else len(self.layers)

    @property
    def ranks(self) -> int:
        return self.cost.ranks

    @cached_property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def budget(self) -> int:
        """Bytes that the whole plan may take."""
        if self.whole:
            return self.whole.budget
        return allowed(self.memory, self.bytes_before)


@dataclass(frozen=True)
class Decision:
    """The slots of every layer, the distance from the optimum if the policy knows it, and remarks. ``dense``: the format of every
    non-expert module, by its place in ``dense.FORMATS``, if the policy chooses them."""

    slots: list[list[Slot]]
    optimality: Optimality | None = None
    remarks: list[str] = field(default_factory=list)
    dense: list[int] | None = None


def problem_of(
    calibration: Calibration,
    *,
    target: Target,
    ranks: int,
    memory: float,
    smoothing: float,
    worst_text: float = 1.0,
    tokens: int = 0,
    whole: Whole | None = None,
) -> Problem:
    """``tokens``: those of the only step to plan for. 0 means two steps: a calibration batch, as in prefill, and one token of
    each of its sequences, as in decoding. ``smoothing`` and ``worst_text``: see ``demand.demand``."""
    layers = tuple(
        _layer(layer, demand(layer, smoothing, worst_text), calibration.dtype, target, weight)
        for layer, weight in zip(calibration.layers, error_weights(calibration, in_nats=whole is not None), strict=True)
    )
    prefill, decode = calibration.batch_size * calibration.sequence_length, calibration.batch_size
    steps = (tokens,) if tokens else (prefill, decode)
    return Problem(layers, calibration.dtype, memory, CostModel(target, ranks), steps, whole)


def error_weights(calibration: Calibration, *, in_nats: bool) -> list[float]:
    """What a relative error of each layer's output counts in a plan; 1 if it was not measured in every layer.

    ``in_nats``: its relative change of the residual stream, as ``DenseCalibration`` has it. Otherwise its change of an average
    token's stream, divided by that of the median layer."""
    shares = [layer.stream_share if in_nats else layer.sensitivity for layer in calibration.layers]
    known = [share for share in shares if share is not None]
    if len(known) < len(shares):
        return [1.0] * len(shares)
    if in_nats:
        return known
    return [share / median(known) for share in known]


def _layer(layer: LayerCalibration, loads: np.ndarray, dtype: Format, target: Target, weight: float) -> Layer:
    experts = layer.geometry.experts
    bits = {name: format.bits for name, format in SLOT_FORMATS.items()}
    stored = [format for format in FORMATS if format in layer.error and format not in held_wider(target)]
    formats = (dtype, *(format for format in stored if bits[format] < bits[dtype]))
    # Experts that the checkpoint stores in another format than most are rounded to that of most.
    own = layer.error.get(dtype, [0.0] * experts)
    error = np.array([own, *(layer.error[format] for format in formats[1:])], np.float64).T
    error[:, 1:] = np.maximum(error[:, 1:], [LEAST_ERROR / 2 ** bits[format] for format in formats[1:]])
    size = np.array([layer.geometry.expert_bytes(format) for format in formats], np.int64)
    return Layer(layer, loads, formats, size, error * weight, weight)
