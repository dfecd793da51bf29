"""What a lowering says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from rq_compile.engine.library import FORMAT_GROUPS
from rq_compile.planning.targets import TARGETS
from rq_compile.quantization.formats import FORMATS, SLOT_FORMATS

if TYPE_CHECKING:
    import onnx

    from rq_compile.engine.library import OpLibrary
    from rq_compile.engine.manifest import Provider
    from rq_compile.planning.schema import LayerPlan, Plan
    from rq_compile.planning.targets import Target
    from rq_compile.quantization.formats import DenseFormat, Format
    from rq_compile.rewrite.dense_gemms import DenseWeights
    from rq_compile.rewrite.slot_weights import Expert, Source
    from rq_compile.rewrite.weights import ExternalWeight, Section

# The formats that the ops of ``rq.moe`` have inputs for.
OF_THE_OP_SET = tuple(name for name, format in SLOT_FORMATS.items() if format.group in FORMAT_GROUPS)
PROVIDERS: dict[str, Provider] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Lowered:
    """A graph without Experts nodes, and the weights that it refers to, unread: ``experts``, a section for each layer, and the
    non-expert ``matrices`` that were laid out anew. ``replaced`` counts what was replaced, by reason."""

    model: onnx.ModelProto
    experts: list[Section]
    matrices: list[Section]
    replaced: dict[str, int]


class Lowering(ABC):
    """How the MoE layers of a graph are realised.

    A kind is a subclass, a frozen dataclass whose fields are its options. ``planned_for`` is the target whose costs are those of
    its engines; ``default_for`` are the targets whose plans choose it; ``options`` are the fields that the command line offers.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # for the help of --lowering, behind the name
    planned_for: ClassVar[Target]
    default_for: ClassVar[tuple[Target, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    formats: ClassVar[tuple[Format, ...]] = FORMATS
    lacks_activations: ClassVar[frozenset[str]] = frozenset()
    device: ClassVar[Literal["cpu", "cuda"]] = "cpu"
    library: ClassVar[OpLibrary | None] = None
    session_options: ClassVar[Mapping[str, str]] = {}  # what ONNX Runtime is to be told
    carries_code: ClassVar[bool] = False  # whether a TensorRT engine holds the code of its MoE layers
    counts_rows: ClassVar[bool] = True  # whether the graph has each layer's tensor slot_offsets
    # What quantized weights meet, and how non-expert matrices are stored; options of some kinds.
    activation_bits: int = 32
    dense_format: DenseFormat = "fp32"

    @property
    def provider(self) -> Provider:
        """ONNX Runtime's execution provider."""
        return PROVIDERS[self.device]

    @classmethod
    def is_batched(cls) -> bool:
        """Whether a layer waits for its busiest slot, so that a plan pays by balancing slots."""
        return TARGETS[cls.planned_for].batched

    def for_checkpoint(self, dtype: Format) -> Self:
        """This lowering for a checkpoint whose weights are mostly in ``dtype``."""
        return self

    def check_layer(self, layer: LayerPlan) -> None:  # noqa: B027 - most take any layer
        """Refuse what the kernels cannot take.

        Raises:
            UserError: its sizes are not theirs.
        """

    @abstractmethod
    def lower(self, model: onnx.ModelProto, plan: Plan, source: Source, dense: DenseWeights | None = None) -> Lowered:
        """Put the plan's slots in place of every Experts node of ``model``, which is not changed.

        ``source`` gives experts and ``dense`` non-expert weights; both are read when the weights are written.

        Raises:
            UserError: the layers of the plan and of the model differ.
            ContractError: a pass is at fault.
        """

    @abstractmethod
    def expert_weights(self, layer: LayerPlan) -> list[ExternalWeight]:
        """The weights of the layer's slots, as ``lower`` lays them out; none is read."""

    def graph_bytes(self, slots: int, products: int) -> int:
        """About what ``slots``, and ``products`` of slots that are multiplied together, add to the graph's file."""
        return 0


def unread(layer: str, expert: int) -> Expert:
    """A ``Source`` for who only wants shapes."""
    raise AssertionError(f"expert {expert} of {layer} is not to be read")
