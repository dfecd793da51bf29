"""``plan.json``: the versioned, validated contract between planning and compiling."""

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rq_compile.architectures.dense_kinds import DenseKind
from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.bounds import (
    MOST_COUNTED,
    MOST_LAYERS,
    MOST_MEMORY,
    MOST_RANKS,
    Count,
    ExpertNumber,
    Imbalance,
    LayerNumber,
    NonNegative,
    Positive,
    Saturated,
    Sha256,
    Share,
)
from rq_compile.calibration.schema import DenseMatrix, StatisticsFile, check_each_once
from rq_compile.files import Document, Name
from rq_compile.planning.targets import Target
from rq_compile.quantization.formats import FLOAT_FORMATS, SLOT_FORMATS, Format, PlannedDense, Quantizer
from rq_compile.versions import Upgrade, Versioned, same_keys

Policy = Literal["none", "paper", "eplb", "craft", "place", "uniform", "frequency", "random", "optimal"]


class Slot(Document):
    """A physical expert: a copy of logical expert ``expert`` stored in ``format`` on ``rank``.

    ``load``: the share of the layer's (token, choice) pairs that this slot is expected to get, as on the calibration text. None
    means unknown; all slots then count equally. Slots with the same format and ``capacity_class`` are lanes of the same width in
    the batched lowering; class 0 of a format is the widest.

    A slot in ``constant`` computes nothing: the expert's mean output on the calibration text replaces its output.
    """

    expert: ExpertNumber
    format: Format
    rank: int = Field(default=0, ge=0, lt=MOST_RANKS)
    load: Share | None = None
    capacity_class: int = Field(default=0, ge=0, le=255)

    @property
    def computed(self) -> bool:
        return SLOT_FORMATS[self.format].computed


def stored_bytes(geometry: ExpertGeometry, slots: Sequence[Slot]) -> int:
    """Bytes of ``slots`` in an engine whose equal copies share their weights: those of one expert with the same format and rank.
    Biases are stored for each slot."""
    distinct = {(slot.expert, slot.format, slot.rank) for slot in slots}
    further = len(slots) - len(distinct)
    return sum(geometry.expert_bytes(format) for _, format, _ in distinct) + further * geometry.bias_bytes


def in_engine_order(slots: Sequence[Slot]) -> list[Slot]:
    """``slots`` with those in ``constant`` last, because an engine has no weights for them."""
    return sorted(slots, key=lambda slot: not slot.computed)


class BatchPrediction(Document):
    """LIS of one layer over ``batches`` batches of (up to) ``sequences`` sequences each: the mean and the 95th percentile."""

    sequences: int = Field(ge=1, le=2**20)
    batches: int = Field(ge=1, le=MOST_COUNTED)
    lis_mean_before: Imbalance
    lis_mean_after: Imbalance
    lis_p95_before: Imbalance
    lis_p95_after: Imbalance


class LayerPrediction(Document):
    """What the planner expects of one layer on the calibration text, without a plan (before) and with it (after).

    ``lis`` is the LIS of the pooled counts, ``worst_text_lis`` that of the calibration text with the highest LIS.
    ``rank_imbalance`` is max / mean load over ranks, None with one rank. ``padded_work`` is the number of rows that the batched
    lowering computes, with the capacity classes of the slots, divided by the useful rows. ``step_time`` (for many tokens, by
    default a calibration batch) and ``token_time`` (for one token) are in seconds of a nominal machine; only their ratios are
    meaningful. Slots in ``constant`` compute nothing and are left out of all these. ``bytes_after`` are those of all slots, see
    also ``LayerPlan.stored_bytes``. ``error``: that of ``LayerCalibration``, summed over the slots and weighted by
    ``problem.error_weights``.
    """

    lis_before: Imbalance
    lis_after: Imbalance
    strict_lis_before: Imbalance
    strict_lis_after: float = Field(ge=1, le=1e6)
    worst_text_lis_before: Imbalance | None = None
    worst_text_lis_after: Imbalance | None = None
    rank_imbalance_before: Imbalance | None = None
    rank_imbalance_after: Imbalance | None = None
    padded_work_before: NonNegative | None = None
    padded_work_after: NonNegative | None = None
    step_time_before: Positive | None = None
    step_time_after: Positive | None = None
    token_time_before: Positive | None = None
    token_time_after: Positive | None = None
    bytes_before: Count
    bytes_after: Count
    error: Saturated
    over_batches: list[BatchPrediction] = Field(default=[])


class Optimality(Document):
    """``objective``: the value that the policy minimised. ``bound``: a lower bound of it for all plans within the budget."""

    objective: Saturated
    bound: Saturated

    @property
    def gap(self) -> float:
        """The largest possible further reduction of the objective, as a fraction of it."""
        return 0.0 if self.objective <= self.bound else (self.objective - self.bound) / self.objective


class LayerPlan(Document):
    """One MoE layer: its physical experts in engine order, those in ``constant`` last. Slot s of the engine is ``slots[s]``.

    Tokens of a logical expert go to its slots in turn, in arrival order: its first token to its first slot, and so on.
    """

    name: str
    index: LayerNumber
    geometry: ExpertGeometry
    slots: list[Slot] = Field(min_length=1)
    unreached: list[ExpertNumber] = Field(default=[], description="logical experts that no calibration token reached")
    predicted: LayerPrediction

    @field_validator("slots")
    @classmethod
    def constant_slots_last(cls, slots: list[Slot]) -> list[Slot]:
        return in_engine_order(slots)

    @model_validator(mode="after")
    def every_expert_has_a_slot(self) -> Self:
        experts = self.geometry.experts
        for does, named in (("places", [slot.expert for slot in self.slots]), ("lists as unreached", self.unreached)):
            if max(named, default=0) >= experts:
                raise ValueError(
                    f"layer {self.index} {does} expert {max(named)}, but the model has {experts} experts (0-{experts - 1})"
                )
        missing = set(range(experts)) - {slot.expert for slot in self.slots}
        if missing:
            raise ValueError(f"layer {self.index} has no slot for expert {min(missing)}")
        floats = {slot.format for slot in self.slots} & set(FLOAT_FORMATS)
        if len(floats) > 1:
            raise ValueError(f"layer {self.index} mixes the float formats {', '.join(sorted(floats))}; choose one")
        copied = Counter(slot.expert for slot in self.slots)
        if several := [expert for expert in self.constant_experts if copied[expert] > 1]:
            raise ValueError(
                f"layer {self.index} has {copied[several[0]]} slots for expert {several[0]}, but an expert in constant has one"
            )
        return self

    @property
    def constant_experts(self) -> list[int]:
        """The experts that are replaced by their mean outputs, in the order of their slots."""
        return [slot.expert for slot in self.slots if not slot.computed]

    @property
    def without_constants(self) -> Self:
        """The layer with only the slots that compute, of which there may be none."""
        return self.model_copy(update={"slots": [slot for slot in self.slots if slot.computed]})

    @property
    def stored_bytes(self) -> int:
        """See ``stored_bytes``. An engine of every lowering but ``batched`` takes these bytes."""
        return stored_bytes(self.geometry, self.slots)


class PlannedModule(Document):
    """A non-expert module whose matrices are stored in ``format``; ``stored`` is the checkpoint's, as far as the engine keeps it.
    ``bytes`` in this format, and ``bytes_stored`` as stored, both in the weights file. ``error``: see ``DenseCalibration``."""

    name: str
    kind: DenseKind
    index: LayerNumber | None = None
    format: PlannedDense
    matrices: list[DenseMatrix] = Field(min_length=1)
    bytes: Count
    bytes_stored: Count
    error: NonNegative


class Plan(Versioned):
    called: ClassVar[str] = "plan"
    command: ClassVar[str] = "rq-compile plan"
    upgrades: ClassVar[dict[int, Upgrade]] = {1: same_keys}

    schema_version: Literal[2] = 2
    kind: Literal["plan"] = "plan"
    tool: str
    model: Name
    model_type: str
    fingerprint: Sha256
    calibration_sha256: Sha256 | None
    quantizer: Quantizer = Field(default="nearest", description="how the weights of quantized slots are rounded")
    statistics: StatisticsFile | None = Field(default=None, description="what the quantizer gptq and slots in constant need")
    policy: Policy
    options: dict[str, str | int | float | bool] = Field(default={})
    target: Target
    memory: float = Field(gt=0, le=MOST_MEMORY)
    ranks: int = Field(default=1, ge=1, le=MOST_RANKS)
    optimality: Optimality | None = Field(default=None, description="None: the policy makes no claim")
    remarks: list[str] = Field(default=[], description="remarks of the planner, one sentence each")
    extra_layers: int = Field(
        default=0, ge=0, lt=MOST_LAYERS, description="number of multi-token-prediction layers of the model, which are not planned"
    )
    layers: list[LayerPlan] = Field(min_length=1)
    engine_bytes: Count | None = Field(
        default=None, description="the budget of the engine's weights file; memory is then what it leaves for the experts"
    )
    dense: list[PlannedModule] = Field(default=[], description="non-expert modules, if the plan decides their formats")
    predicted_engine_bytes: Count | None = Field(default=None, description="bytes of the engine's weights file")
    model_error: NonNegative | None = Field(
        default=None, description="errors of all experts and modules together, in nats; only with engine_bytes"
    )

    @model_validator(mode="after")
    def has_every_layer_once_on_its_ranks(self) -> Self:
        check_each_once([(layer.name, layer.index) for layer in self.layers])
        for layer in self.layers:
            if (rank := max(slot.rank for slot in layer.slots)) >= self.ranks:
                raise ValueError(
                    f"layer {layer.index} has a slot on rank {rank}, but the plan has {self.ranks} (0-{self.ranks - 1})"
                )
        return self

    @property
    def bytes_before(self) -> int:
        return sum(layer.predicted.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all slots."""
        return sum(layer.predicted.bytes_after for layer in self.layers)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all slots if equal copies on a rank are stored once."""
        return sum(layer.stored_bytes for layer in self.layers)
