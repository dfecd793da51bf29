"""The weights of the slots that are lanes of one batched product, as standard ops take them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rq_compile.planning.schema import LayerPlan, Slot
from rq_compile.quantization.formats import QUANTIZED_FORMATS, block_size
from rq_compile.quantization.quantizer import Quantized, quantize, whole_numbers
from rq_compile.rewrite.slot_weights import FLOAT_DTYPES, Source
from rq_compile.rewrite.weights import INT4, ExternalWeight

QUANTIZED_DTYPES = {"int8": np.dtype(np.int8), "int4": INT4}


@dataclass(frozen=True)
class LaneWeights:
    """One projection of n slots, a matrix ``[columns, rows]`` each, as ``x @ W`` wants it.

    ``values [n, columns, rows]`` in the slots' format. Quantized, ``block`` neighbours of a column share a scale of ``scales``
    fp32 ``[n, blocks, rows]``, and columns are padded to whole blocks. ``bias`` fp32 ``[n, 1, rows]``.
    """

    values: ExternalWeight
    scales: ExternalWeight | None
    bias: ExternalWeight | None
    block: int

    @property
    def all(self) -> list[ExternalWeight]:
        return [weight for weight in (self.values, self.scales, self.bias) if weight]


def lane_weights(plan: LayerPlan, slots: Sequence[Slot], name: str, projection: str, source: Source) -> LaneWeights:
    """Describe the weights of ``projection`` ("up" or "down") of ``slots``, all of one format, without reading any."""
    geometry, format = plan.geometry, slots[0].format
    rows, columns = (geometry.up_rows, geometry.hidden) if projection == "up" else (geometry.hidden, geometry.intermediate)
    block = block_size(columns)
    blocks = -(-columns // block)
    # Quantizing is the slow part of writing: the scales, a few per cent of the bytes, are kept until their turn comes.
    kept: dict[int, np.ndarray] = {}

    def part(slot: Slot, name: str) -> Any:
        return getattr(source(plan.name, slot.expert), name)

    def rounded(slot: Slot) -> Quantized:
        return quantize(part(slot, projection), format, part(slot, f"{projection}_moment"))

    def values() -> Iterator[np.ndarray]:
        for place, slot in enumerate(slots):
            if format not in QUANTIZED_FORMATS:
                yield part(slot, projection).astype(FLOAT_DTYPES[format], copy=False).T
            else:
                result = rounded(slot)
                kept[place] = result.scales
                yield whole_numbers(result, format).T

    def scales() -> Iterator[np.ndarray]:
        for place, slot in enumerate(slots):
            yield (kept.pop(place) if place in kept else rounded(slot).scales).T

    def bias() -> Iterator[np.ndarray]:
        return (part(slot, f"{projection}_bias").astype(np.float32, copy=False) for slot in slots)

    held = len(slots)
    packed = format in QUANTIZED_FORMATS
    dtype, padded = (QUANTIZED_DTYPES[format], blocks * block) if packed else (FLOAT_DTYPES[format], columns)
    fp32 = np.dtype(np.float32)
    return LaneWeights(
        ExternalWeight(f"{name}.{projection}_weights", dtype, (held, padded, rows), values),
        ExternalWeight(f"{name}.{projection}_scales", fp32, (held, blocks, rows), scales) if packed else None,
        ExternalWeight(f"{name}.{projection}_bias", fp32, (held, 1, rows), bias) if geometry.bias else None,
        block,
    )
