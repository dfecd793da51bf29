"""The weights of a layer's slots, grouped by format as ExpertGemm takes them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rq_compile.architectures.geometry import GATED
from rq_compile.engine.library import FORMAT_GROUPS
from rq_compile.errors import UserError
from rq_compile.planning.schema import LayerPlan, Slot
from rq_compile.quantization.formats import (
    PACKED_FORMATS,
    SLOT_FORMATS,
    WORD_BYTES,
    Block,
    Format,
    SlotFormat,
    block_size,
    tensors_of,
)
from rq_compile.quantization.packing import Quantized, in_planes, packed, scale_values, stored_scales, whole_numbers
from rq_compile.quantization.quantizer import carried, quantize
from rq_compile.quantization.second_moment import SecondMoment
from rq_compile.quantization.source_numbers import SourceNumbers
from rq_compile.rewrite.panels import ROWS, float_panels, packed_panels, panel_count, scale_panels
from rq_compile.rewrite.weights import ExternalWeight, Piece, Section

# Returns an expert by layer name and number; its values are used once and not kept.
Source = Callable[[str, int], "Expert"]
# Bytes of a weight while it is read, quantized and packed: at most two copies in fp32.
BYTES_OF_A_WEIGHT = 8


class Expert(Protocol):
    """The attributes of ``ExpertWeights``, held in memory or read from the checkpoint when accessed."""

    @property
    def up(self) -> np.ndarray: ...
    @property
    def down(self) -> np.ndarray: ...
    @property
    def up_bias(self) -> np.ndarray | None: ...
    @property
    def down_bias(self) -> np.ndarray | None: ...
    @property
    def up_moment(self) -> SecondMoment | None: ...
    @property
    def down_moment(self) -> SecondMoment | None: ...
    @property
    def up_numbers(self) -> SourceNumbers | None: ...
    @property
    def down_numbers(self) -> SourceNumbers | None: ...
    @property
    def mean_output(self) -> np.ndarray | None: ...


def quantized(expert: Expert, projection: str, format: Format, most: Block) -> Quantized:
    """A matrix of ``expert`` in ``format``: exactly as the checkpoint stores it if the format can hold that, else rounded.

    Raises:
        UserError: it would have to be rounded, but nothing is rounded to this format.
    """
    held = carried(getattr(expert, f"{projection}_numbers"), format, most)
    if held is None and SLOT_FORMATS[format].only_carried:
        raise UserError(
            f"the plan stores an expert in {format}, but the checkpoint does not store it like that; make the plan from a "
            "calibration of this checkpoint with --block auto, or write int4 instead",
            2,
        )
    return held or quantize(getattr(expert, projection), format, getattr(expert, f"{projection}_moment"), most)


class HeldSlot(Slot):
    """A slot that an engine stores in ``format``, with the values that ``rounded_to``, the plan's format, gives its weights."""

    rounded_to: Format


def held_slot(slot: Slot, format: Format) -> Slot:
    """``slot`` as an engine stores it, in ``format``, which has all values of the slot's own."""
    if format == slot.format or not SLOT_FORMATS[format].quantized:
        return slot.model_copy(update={"format": format})
    return HeldSlot(**{**dict(slot), "format": format, "rounded_to": slot.format})


def rounded_to(slot: Slot) -> Format:
    """The format whose values the slot's weights have."""
    return slot.rounded_to if isinstance(slot, HeldSlot) else slot.format


def quantized_slot(slot: Slot, expert: Expert, projection: str, most: Block) -> Quantized:
    """A matrix of ``expert`` as ``slot`` stores it.

    Raises:
        UserError: see ``quantized``.
    """
    given = rounded_to(slot)
    result = quantized(expert, projection, given, most)
    if given == slot.format:
        return result
    scales = stored_scales(scale_values(result.scales, given), slot.format)
    return Quantized(packed(whole_numbers(result, given), slot.format), scales)


def group_of(format: Format) -> int:
    """The code of ``format`` in an op's attribute ``formats``: the place of its group among ``FORMAT_GROUPS``."""
    return FORMAT_GROUPS.index(SLOT_FORMATS[format].group)


def operands_of(formats: Iterable[int]) -> list[str]:
    """The weights among the inputs of a node with the attribute ``formats``, in order, and the optional bias after them."""
    return [*(name for code in sorted(set(formats)) for name in tensors_of(FORMAT_GROUPS[code])), "bias"]


@dataclass(frozen=True)
class SlotWeights:
    """One projection of a layer: the weights that are inputs of ExpertGemm, in the order of ``operands_of``.

    ``index[s]`` is the place of slot s's weights inside their format group; ``pieces`` fill the inputs.
    """

    inputs: tuple[ExternalWeight, ...]
    index: tuple[int, ...]
    pieces: tuple[Piece, ...]


def section_of(layer: str, projections: Iterable[SlotWeights]) -> Section:
    """The weights of the slots of ``layer``."""
    held = list(projections)
    weights, pieces = ([part for projection in held for part in getattr(projection, what)] for what in ("inputs", "pieces"))
    return Section(layer, tuple(weights), tuple(pieces))


def slot_weights(plan: LayerPlan, projection: str, source: Source, *, panels: bool) -> SlotWeights:
    """Describe the weights of ``projection`` ("up" or "down") without reading any.

    Slots that hold the same expert in the same format refer to the same weights. ``panels``: lay them out as the native lowering
    reads them (see ``panels``), else row by row as for ``MatMulNBits``.
    """
    geometry = plan.geometry
    rows, columns = (geometry.up_rows, geometry.hidden) if projection == "up" else (geometry.hidden, geometry.intermediate)
    groups: list[list[Slot]] = [[] for _ in FORMAT_GROUPS]
    index: list[int] = []
    for slot in plan.slots:
        group = groups[group_of(slot.format)]
        same = [i for i, held in enumerate(group) if (held.expert, rounded_to(held)) == (slot.expert, rounded_to(slot))]
        index.append(same[0] if same else len(group))
        if not same:
            group.append(slot)

    halves = 2 if projection == "up" and geometry.activation in GATED else 1
    block = block_size(columns, geometry.block)
    layout = _Panels(rows, columns, block, halves) if panels else _Rows(rows, columns, block)
    part = _Projection(plan.name, projection, source, geometry.block)
    found = [_group(part, slots, layout) for slots in groups if slots]
    if geometry.bias:
        found.append(_bias(part, plan, rows))
    inputs = tuple(weight for weights, _ in found for weight in weights)
    return SlotWeights(inputs, tuple(index), tuple(piece for _, pieces in found for piece in pieces))


@dataclass(frozen=True)
class _Projection:
    """One projection of the experts of a layer."""

    layer: str
    name: str
    source: Source
    block: Block

    def matrix(self, expert: int) -> np.ndarray:
        return getattr(self.source(self.layer, expert), self.name)

    def bias(self, expert: int) -> np.ndarray:
        return getattr(self.source(self.layer, expert), f"{self.name}_bias").astype(np.float32, copy=False)

    def quantized(self, slot: Slot) -> Quantized:
        return quantized_slot(slot, self.source(self.layer, slot.expert), self.name, self.block)

    def weight(self, suffix: str, dtype: np.dtype, shape: tuple[int, ...]) -> ExternalWeight:
        return ExternalWeight(f"{self.layer}.{self.name}.{suffix}", dtype, shape)


class _Rows:
    """A matrix row by row; quantized, as ``quantize`` packs it or, in 3 bits, with ``in_planes``."""

    def __init__(self, rows: int, columns: int, block: int) -> None:
        self.rows, self.columns, self.block = rows, columns, block
        self.blocks = -(-columns // self.block)
        self.memory = BYTES_OF_A_WEIGHT * rows * columns

    def float_shape(self) -> tuple[int, ...]:
        return self.rows, self.columns

    def packed_shape(self, format: Format) -> tuple[int, ...]:
        return self.rows, self.blocks * self.block * SLOT_FORMATS[format].bits // 8

    def scales_shape(self) -> tuple[int, ...]:
        return self.rows, self.blocks

    def floats(self, weights: np.ndarray) -> np.ndarray:
        return weights

    def quantized(self, by_row: Quantized, format: Format) -> Quantized:
        return Quantized(in_planes(by_row.packed, SLOT_FORMATS[format].bits, self.blocks), by_row.scales)


class _Panels(_Rows):
    """A matrix as ``panels`` lays it out."""

    def __init__(self, rows: int, columns: int, block: int, halves: int) -> None:
        super().__init__(rows, columns, block)
        self.halves, self.panels = halves, panel_count(rows, halves)

    def float_shape(self) -> tuple[int, ...]:
        return self.panels, self.columns, ROWS

    def packed_shape(self, format: Format) -> tuple[int, ...]:
        return self.panels, self.blocks * PACKED_FORMATS[format].words(self.block), WORD_BYTES * ROWS

    def scales_shape(self) -> tuple[int, ...]:
        return self.panels, self.blocks, ROWS

    def floats(self, weights: np.ndarray) -> np.ndarray:
        return float_panels(weights, self.halves)

    def quantized(self, by_row: Quantized, format: Format) -> Quantized:
        return Quantized(packed_panels(by_row, format, self.halves), scale_panels(by_row, self.halves))


# Inputs, and the pieces that contain their values.
Found = tuple[tuple[ExternalWeight, ...], tuple[Piece, ...]]


def _group(part: _Projection, slots: list[Slot], layout: _Rows) -> Found:
    """The tensors that the format of ``slots``, all of one group, declares; float slots of a plan have one format."""
    format = SLOT_FORMATS[slots[0].format]
    return _quantized(part, slots, layout, format.name) if format.quantized else _floats(part, slots, layout, format)


def _floats(part: _Projection, slots: list[Slot], layout: _Rows, format: SlotFormat) -> Found:
    (name,), dtype = format.tensors, format.dtype
    weight = part.weight(name, dtype, (len(slots), *layout.float_shape()))

    def piece(slot: Slot) -> Piece:
        values = lambda: (layout.floats(part.matrix(slot.expert).astype(dtype, copy=False)),)  # noqa: E731
        return Piece((weight,), values, layout.memory)

    return (weight,), tuple(map(piece, slots))


def _quantized(part: _Projection, slots: list[Slot], layout: _Rows, format: Format) -> Found:
    kept = PACKED_FORMATS[format]
    of_packed, of_scales = kept.tensors
    # For GPTQ, all matrices that multiply the layer's inputs need the factors of their moment.
    preparation = part.layer if part.name == "up" else None
    codes = part.weight(of_packed, np.dtype(np.uint8), (len(slots), *layout.packed_shape(format)))
    scales = part.weight(of_scales, np.dtype(np.uint8 if kept.exponents else np.float32), (len(slots), *layout.scales_shape()))

    def piece(slot: Slot) -> Piece:
        def values() -> tuple[np.ndarray, ...]:
            result = layout.quantized(part.quantized(slot), format)
            return result.packed, result.scales

        return Piece((codes, scales), values, layout.memory, preparation)

    return (codes, scales), tuple(map(piece, slots))


def _bias(part: _Projection, plan: LayerPlan, rows: int) -> Found:
    weight = part.weight("bias", np.dtype(np.float32), (len(plan.slots), rows))
    values = lambda: (np.stack([part.bias(slot.expert) for slot in plan.slots]),)  # noqa: E731
    return (weight,), (Piece((weight,), values, 2 * weight.bytes),)
