"""The weights of a layer's slots, grouped by format as ExpertGemm takes them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from rq_compile.architectures.geometry import GATED
from rq_compile.planning.schema import LayerPlan, Slot
from rq_compile.quantization.formats import BITS, FLOAT_FORMATS, Format, block_size
from rq_compile.quantization.quantizer import Quantized, quantize
from rq_compile.rewrite.panels import ROWS, float_panels, packed_panels, panel_count, scale_panels
from rq_compile.rewrite.weights import ExternalWeight

if TYPE_CHECKING:
    from rq_compile.architectures.layers import ExpertWeights

Source = Callable[[str, int], "ExpertWeights"]
GROUPS = ("float", "int8", "int4")
FLOAT_DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def group_of(format: Format) -> int:
    """The code of ``format`` in ExpertGemm's attribute ``formats``: 0 float, 1 int8, 2 int4."""
    return 0 if format in FLOAT_FORMATS else GROUPS.index(format)


@dataclass(frozen=True)
class SlotWeights:
    """One projection of a layer: the optional inputs of ExpertGemm in their order, None where the plan has no use for them.

    ``index[s]`` is the place of slot s's weights inside their format group.
    """

    inputs: tuple[ExternalWeight | None, ...]
    index: tuple[int, ...]


def slot_weights(plan: LayerPlan, projection: str, source: Source, *, panels: bool) -> SlotWeights:
    """Describe the weights of ``projection`` ("up" or "down") without reading any.

    Slots that hold one expert in one format refer to the same weights. ``panels``: lay them out as the native lowering reads
    them (see ``panels``), else row by row as ``MatMulNBits`` does.
    """
    geometry = plan.geometry
    rows, columns = (geometry.up_rows, geometry.hidden) if projection == "up" else (geometry.hidden, geometry.intermediate)
    groups: list[list[Slot]] = [[], [], []]
    index: list[int] = []
    for slot in plan.slots:
        group = groups[group_of(slot.format)]
        same = [i for i, held in enumerate(group) if held.expert == slot.expert]
        index.append(same[0] if same else len(group))
        if not same:
            group.append(slot)

    def matrix(expert: int) -> np.ndarray:
        return getattr(source(plan.name, expert), projection)

    def quantized(expert: int, format: Format) -> Quantized:
        weights = source(plan.name, expert)
        return quantize(getattr(weights, projection), format, getattr(weights, f"{projection}_moment"))

    halves = 2 if projection == "up" and geometry.activation in GATED else 1
    layout = _Panels(rows, columns, halves) if panels else _Rows(rows, columns)
    prefix = f"{plan.name}.{projection}"
    inputs: list[ExternalWeight | None] = [_floats(f"{prefix}.float_weights", groups[0], layout, matrix)]
    for code in (1, 2):
        inputs += _quantized(f"{prefix}.{GROUPS[code]}", groups[code], layout, quantized)
    inputs.append(_bias(f"{prefix}.bias", plan, rows, lambda expert: getattr(source(plan.name, expert), f"{projection}_bias")))
    return SlotWeights(tuple(inputs), tuple(index))


class _Rows:
    """A matrix row by row; quantized, as ``quantize`` packs it."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns, self.block = rows, columns, block_size(columns)
        self.blocks = -(-columns // self.block)

    def float_shape(self) -> tuple[int, ...]:
        return self.rows, self.columns

    def packed_shape(self, format: Format) -> tuple[int, ...]:
        return self.rows, self.blocks * self.block * BITS[format] // 8

    def scales_shape(self) -> tuple[int, ...]:
        return self.rows, self.blocks

    def floats(self, weights: np.ndarray) -> np.ndarray:
        return weights

    def quantized(self, by_row: Quantized, format: Format) -> Quantized:
        return by_row


class _Panels(_Rows):
    """A matrix as ``panels`` lays it out."""

    def __init__(self, rows: int, columns: int, halves: int) -> None:
        super().__init__(rows, columns)
        self.halves, self.panels = halves, panel_count(rows, halves)

    def float_shape(self) -> tuple[int, ...]:
        return self.panels, self.columns, ROWS

    def packed_shape(self, format: Format) -> tuple[int, ...]:
        return self.panels, self.blocks * self.block * BITS[format] // 32, 4 * ROWS

    def scales_shape(self) -> tuple[int, ...]:
        return self.panels, self.blocks, ROWS

    def floats(self, weights: np.ndarray) -> np.ndarray:
        return float_panels(weights, self.halves)

    def quantized(self, by_row: Quantized, format: Format) -> Quantized:
        return Quantized(packed_panels(by_row, format, self.halves), scale_panels(by_row, self.halves))


def _floats(name: str, slots: list[Slot], layout: _Rows, matrix: Callable[[int], np.ndarray]) -> ExternalWeight | None:
    if not slots:
        return None
    dtype = FLOAT_DTYPES[slots[0].format]
    chunks = lambda: (layout.floats(matrix(slot.expert).astype(dtype, copy=False)) for slot in slots)  # noqa: E731
    return ExternalWeight(name, dtype, (len(slots), *layout.float_shape()), chunks)


def _quantized(
    name: str, slots: list[Slot], layout: _Rows, by_row: Callable[[int, Format], Quantized]
) -> list[ExternalWeight | None]:
    if not slots:
        return [None, None]
    format = slots[0].format
    # Quantizing is the slow part of writing: the scales, a few per cent of the bytes, are kept until their turn comes.
    kept: dict[int, np.ndarray] = {}

    def packed() -> Iterator[np.ndarray]:
        for place, slot in enumerate(slots):
            result = layout.quantized(by_row(slot.expert, format), format)
            kept[place] = result.scales
            yield result.packed

    def scales() -> Iterator[np.ndarray]:
        for place, slot in enumerate(slots):
            yield kept.pop(place) if place in kept else layout.quantized(by_row(slot.expert, format), format).scales

    return [
        ExternalWeight(f"{name}_packed", np.dtype(np.uint8), (len(slots), *layout.packed_shape(format)), packed),
        ExternalWeight(f"{name}_scales", np.dtype(np.float32), (len(slots), *layout.scales_shape()), scales),
    ]


def _bias(name: str, plan: LayerPlan, rows: int, bias: Callable[[int], np.ndarray]) -> ExternalWeight | None:
    if not plan.geometry.bias:
        return None
    chunks = lambda: (bias(slot.expert).astype(np.float32, copy=False) for slot in plan.slots)  # noqa: E731
    return ExternalWeight(name, np.dtype(np.float32), (len(plan.slots), rows), chunks)
