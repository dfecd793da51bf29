"""The interface of a lowering."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from rq_compile.engine.library import FORMAT_GROUPS
from rq_compile.planning.targets import TARGETS
from rq_compile.quantization.formats import FLOAT_FORMATS, FORMATS, SLOT_FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

    from rq_compile.engine.library import OpLibrary
    from rq_compile.engine.manifest import Provider
    from rq_compile.planning.schema import LayerPlan, Plan
    from rq_compile.planning.targets import Target
    from rq_compile.quantization.formats import DenseFormat, Format
    from rq_compile.rewrite.dense_gemms import DenseWeights
    from rq_compile.rewrite.report import PassReport
    from rq_compile.rewrite.slot_weights import Expert, Source
    from rq_compile.rewrite.weights import ExternalWeight, Section

# The formats that the ops of ``rq.moe`` have inputs for.
OF_THE_OP_SET = tuple(name for name, format in SLOT_FORMATS.items() if format.group in FORMAT_GROUPS or not format.computed)
PROVIDERS: dict[str, Provider] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Lowered:
    """A graph without Experts nodes, and the weights that it refers to, which are not read yet. ``experts``: one section per
    layer. ``matrices``: the non-expert matrices with a new layout. ``reports``: those of the passes. ``replaced``: counts of what
    else was replaced, by reason."""

    model: onnx.ModelProto
    experts: list[Section]
    matrices: list[Section]
    reports: list[PassReport]
    replaced: dict[str, int]


class Lowering(ABC):
    """How the MoE layers of a graph are written for a runtime.

    Each kind is a subclass, a frozen dataclass whose fields are its options. ``planned_for``: the target whose costs are those of
    its engines. ``default_for``: the targets whose plans use it by default. ``options``: the fields that the command line offers.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # for the help of --lowering, after the name
    planned_for: ClassVar[Target]
    default_for: ClassVar[tuple[Target, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    formats: ClassVar[tuple[Format, ...]] = FORMATS
    lacks_activations: ClassVar[frozenset[str]] = frozenset()
    device: ClassVar[Literal["cpu", "cuda"]] = "cpu"
    library: ClassVar[OpLibrary | None] = None
    session_options: ClassVar[Mapping[str, str]] = {}  # entries for ONNX Runtime's session options
    carries_code: ClassVar[bool] = False  # whether a TensorRT engine holds the code of its MoE layers
    # The format in which slots are stored that a plan has in another one, which has the same values but no op here.
    held_as: ClassVar[Mapping[Format, Format]] = {}
    counts_rows: ClassVar[bool] = True  # whether the graph has each layer's tensor slot_offsets
    rounds_dense: ClassVar[bool] = False  # whether it runs non-expert weights that a plan rounds
    layer_bytes: ClassVar[int] = 14_000  # approximate bytes of a layer's nodes in the graph's file
    of_ranks: ClassVar[bool] = False  # whether the engine is a folder with a graph for each rank of the plan
    # Bits of the activations of quantized weights, and the format of non-expert matrices; options of some kinds.
    activation_bits: int = 32
    dense_format: DenseFormat = "fp32"

    @property
    def provider(self) -> Provider:
        """ONNX Runtime's execution provider."""
        return PROVIDERS[self.device]

    @classmethod
    def is_batched(cls) -> bool:
        """Whether a layer waits for its busiest slot, so that balanced slots save time."""
        return TARGETS[cls.planned_for].batched

    def for_checkpoint(self, dtype: Format) -> Self:
        """This lowering for a checkpoint whose weights are mostly in ``dtype``."""
        return self

    def held(self, layer: LayerPlan) -> LayerPlan:
        """``layer`` with its slots in the formats in which this lowering stores them."""
        from rq_compile.rewrite.slot_weights import held_slot

        formats: list[Format] = [self.held_as.get(slot.format, slot.format) for slot in layer.slots]
        if len(set(formats) & set(FLOAT_FORMATS)) > 1:  # a layer has one float format
            formats = ["fp32" if format in FLOAT_FORMATS else format for format in formats]
        slots = [held_slot(slot, format) for slot, format in zip(layer.slots, formats, strict=True)]
        return layer.model_copy(update={"slots": slots})

    def held_differently(self, plan: Plan) -> dict[str, int]:
        """Counts of the slots that are stored in another format than that of the plan, for the manifest."""
        pairs = Counter(
            (slot.format, held.format)
            for layer in plan.layers
            for slot, held in zip(layer.slots, self.held(layer).slots, strict=True)
            if slot.format != held.format
        )
        return {f"{format} slots held as {other}": count for (format, other), count in pairs.items()}

    def check_layer(self, layer: LayerPlan) -> None:  # noqa: B027 - most support any layer
        """Refuse a layer that the kernels do not support.

        Raises:
            UserError: they do not support its sizes.
        """

    @abstractmethod
    def lower(self, model: onnx.ModelProto, plan: Plan, source: Source, dense: DenseWeights | None = None) -> Lowered:
        """Replace every Experts node of ``model`` by the plan's slots. ``model`` itself is not changed.

        ``source`` provides experts and ``dense`` non-expert weights. Both are read when the weights are written.

        Raises:
            UserError: the layers of the plan and of the model differ.
            ContractError: a pass has an error.
        """

    def graphs(self, model: onnx.ModelProto, plan: Plan, source: Source, dense: DenseWeights | None = None) -> list[Lowered]:
        """As ``lower``: the graph of every process that runs the engine. All have the same non-expert weights."""
        return [own.lower(model, plan, source, dense) for own in self.of_processes(plan)]

    def of_processes(self, plan: Plan) -> list[Self]:
        """The lowering of every process that runs the engine."""
        return [self]

    @abstractmethod
    def computed_section(self, layer: LayerPlan, source: Source) -> Section:
        """The weights of a layer whose slots all compute, of which there is at least one, unread."""

    def expert_sections(self, layers: Sequence[LayerPlan], source: Source) -> list[Section]:
        """The weights of the slots of ``layers`` that ``lower`` returns, without a graph: those of each layer that has any,
        unread."""
        computed = [layer.without_constants for layer in layers]
        return with_mean_outputs([self.computed_section(layer, source) for layer in computed if layer.slots], layers, source)

    def expert_weights(self, layer: LayerPlan) -> list[ExternalWeight]:
        """The weights of the layer's slots in all graphs."""
        return [weight for section in self.expert_sections([layer], unread) for weight in section.weights]

    def graph_bytes(self, slots: int, products: int) -> int:
        """Approximate bytes that ``slots`` slots, in ``products`` joint products, add to the graph's file."""
        return 0


def with_mean_outputs(experts: Sequence[Section], layers: Sequence[LayerPlan], source: Source) -> list[Section]:
    """``experts``, after the mean outputs of the constant experts of ``layers``."""
    from rq_compile.rewrite.constant_experts import mean_output_sections

    return [*mean_output_sections(layers, source), *experts]


def unread(layer: str, expert: int) -> Expert:
    """A ``Source`` for callers that only need shapes."""
    raise AssertionError(f"expert {expert} of {layer} is not to be read")
