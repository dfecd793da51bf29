"""The weights of a layer's slots, grouped by format as ExpertGemm takes them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from rq_compile.planning.schema import LayerPlan, Slot
from rq_compile.quantization.formats import BITS, FLOAT_FORMATS, Format, block_size
from rq_compile.quantization.quantizer import quantize
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

    ``index[s]`` is slot s's place inside its format group.
    """

    inputs: tuple[ExternalWeight | None, ...]
    index: tuple[int, ...]


def slot_weights(plan: LayerPlan, projection: str, source: Source, share_copies: bool) -> SlotWeights:
    """Describe the weights of ``projection`` ("up" or "down") without reading any.

    ``share_copies``: slots that hold one expert in one format refer to the same weights; otherwise each slot has its own.
    """
    geometry = plan.geometry
    rows, columns = (geometry.up_rows, geometry.hidden) if projection == "up" else (geometry.hidden, geometry.intermediate)
    groups: list[list[Slot]] = [[], [], []]
    index: list[int] = []
    for slot in plan.slots:
        group = groups[group_of(slot.format)]
        same = [i for i, held in enumerate(group) if share_copies and held.expert == slot.expert]
        index.append(same[0] if same else len(group))
        if not same:
            group.append(slot)

    def matrix(expert: int) -> np.ndarray:
        return getattr(source(plan.name, expert), projection)

    prefix = f"{plan.name}.{projection}"
    inputs: list[ExternalWeight | None] = [_floats(f"{prefix}.float_weights", groups[0], rows, columns, matrix)]
    for code in (1, 2):
        inputs += _quantized(f"{prefix}.{GROUPS[code]}", groups[code], rows, columns, matrix)
    inputs.append(_bias(f"{prefix}.bias", plan, rows, lambda expert: getattr(source(plan.name, expert), f"{projection}_bias")))
    return SlotWeights(tuple(inputs), tuple(index))


def _floats(name: str, slots: list[Slot], rows: int, columns: int, matrix: Callable[[int], np.ndarray]) -> ExternalWeight | None:
    if not slots:
        return None
    dtype = FLOAT_DTYPES[slots[0].format]
    return ExternalWeight(
        name, dtype, (len(slots), rows, columns), lambda: (matrix(slot.expert).astype(dtype, copy=False) for slot in slots)
    )


def _quantized(
    name: str, slots: list[Slot], rows: int, columns: int, matrix: Callable[[int], np.ndarray]
) -> list[ExternalWeight | None]:
    if not slots:
        return [None, None]
    format = slots[0].format
    block = block_size(columns)
    blocks = -(-columns // block)
    # Quantizing is the slow part of writing: the scales, a few per cent of the bytes, are kept until their turn comes.
    kept: dict[int, np.ndarray] = {}

    def packed() -> Iterator[np.ndarray]:
        for place, slot in enumerate(slots):
            result = quantize(matrix(slot.expert), format)
            kept[place] = result.scales
            yield result.packed

    def scales() -> Iterator[np.ndarray]:
        for place, slot in enumerate(slots):
            yield kept.pop(place) if place in kept else quantize(matrix(slot.expert), format).scales

    return [
        ExternalWeight(f"{name}_packed", np.dtype(np.uint8), (len(slots), rows, blocks * block * BITS[format] // 8), packed),
        ExternalWeight(f"{name}_scales", np.dtype(np.float32), (len(slots), rows, blocks), scales),
    ]


def _bias(name: str, plan: LayerPlan, rows: int, bias: Callable[[int], np.ndarray]) -> ExternalWeight | None:
    if not plan.geometry.bias:
        return None
    chunks = lambda: (bias(slot.expert).astype(np.float32, copy=False) for slot in plan.slots)  # noqa: E731
    return ExternalWeight(name, np.dtype(np.float32), (len(plan.slots), rows), chunks)
