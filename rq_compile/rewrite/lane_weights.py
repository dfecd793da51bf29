"""The weights of the slots that are lanes of one batched product, in the layout of standard ops."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rq_compile.planning.schema import LayerPlan, Slot
from rq_compile.quantization.formats import SLOT_FORMATS, block_size
from rq_compile.quantization.packing import whole_numbers
from rq_compile.quantization.rounding import holding_scales, nearest
from rq_compile.rewrite.slot_weights import BYTES_OF_A_WEIGHT, Source, quantized_slot
from rq_compile.rewrite.weights import ExternalWeight, Piece


@dataclass(frozen=True)
class LaneWeights:
    """One projection of n slots, each a matrix ``[columns, rows]`` for ``x @ W``.

    ``values [n, columns, rows]`` are in the slots' format. If quantized, ``block`` neighbours of a column share a scale of
    ``scales`` fp32 ``[n, blocks, rows]``, and columns are padded to whole blocks. ``bias`` fp32 ``[n, 1, rows]``. ``pieces``
    compute the values.
    """

    values: ExternalWeight
    scales: ExternalWeight | None
    bias: ExternalWeight | None
    block: int
    pieces: tuple[Piece, ...]

    @property
    def all(self) -> list[ExternalWeight]:
        return [weight for weight in (self.values, self.scales, self.bias) if weight]


def lane_weights(
    plan: LayerPlan, slots: Sequence[Slot], name: str, projection: str, source: Source, *, whole_columns: bool = False
) -> LaneWeights:
    """Describe the weights of ``projection`` ("up" or "down") of ``slots``, all in one format, without reading any.

    ``whole_columns``: int8 has one scale for a whole column and is rounded to the nearest, whatever the plan's quantizer is.
    TensorRT multiplies by such weights without unpacking them; it would first expand block-wise ones to 16 bits.
    """
    geometry, format = plan.geometry, slots[0].format
    rows, columns = (geometry.up_rows, geometry.hidden) if projection == "up" else (geometry.hidden, geometry.intermediate)
    kept = SLOT_FORMATS[format]
    whole = whole_columns and kept.element == "int8"
    block = columns if whole else block_size(columns, geometry.block)
    blocks = -(-columns // block)
    held, fp32 = len(slots), np.dtype(np.float32)
    packed, dtype = kept.quantized, kept.dtype
    padded = blocks * block if packed else columns
    values = ExternalWeight(f"{name}.{projection}_weights", dtype, (held, padded, rows))
    scales = ExternalWeight(f"{name}.{projection}_scales", fp32, (held, blocks, rows)) if packed else None
    bias = ExternalWeight(f"{name}.{projection}_bias", fp32, (held, 1, rows)) if geometry.bias else None

    def lane(slot: Slot) -> Piece:
        def computed() -> tuple[np.ndarray, ...]:
            expert = source(plan.name, slot.expert)
            biases = (getattr(expert, f"{projection}_bias").astype(np.float32, copy=False),) if bias else ()
            if not packed:
                return getattr(expert, projection).astype(dtype, copy=False).T, *biases
            if whole:
                matrix = getattr(expert, projection).astype(np.float32)
                scale = holding_scales(matrix, format)
                return nearest(matrix, scale, format).astype(np.int8).T, scale[None], *biases
            result = quantized_slot(slot, expert, projection, geometry.block)
            return whole_numbers(result, format).T, result.scales.T, *biases

        filled = tuple(weight for weight in (values, scales, bias) if weight)
        return Piece(filled, computed, BYTES_OF_A_WEIGHT * rows * columns)

    return LaneWeights(values, scales, bias, block, tuple(map(lane, slots)))
