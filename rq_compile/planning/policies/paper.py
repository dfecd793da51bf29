"""Policy ``paper``: Replicate-and-Quantize as published (arXiv 2602.19938, Algorithms 1-3), layer by layer.

The heavy hitter (the expert with the highest load) gets one copy in a half-width format, and the less-important expert (the one
with the highest mean Wanda score) is quantized to that format in place. The paper leaves these points open:

1. *Both may be the same expert.* Then the next expert in the ranking is quantized, because quantizing the original of the heavy
   hitter too would defeat the purpose of keeping it. ``skip_heavy_hitter=false`` follows the paper literally.
2. *Scales.* An int8 copy with its scales takes a little more than half the bytes of a bf16 expert, so one copy and one quantized
   expert exceed the original bytes. ``in_place=auto`` quantizes further experts, in the order of the ranking, until the layer
   fits its budget; this also works for budgets below 1. ``in_place=1`` follows the paper literally.
3. *Half-width* means int8 for fp16 and bf16. For fp32, it is fp16 in the paper; an engine holds one float format per layer, so it
   is int8 here too. ``format`` selects another.
4. *Ranks* are not in the paper: experts stay in consecutive blocks, and the copy goes to the least busy rank without the
   original.
5. *The split of tokens* between copies is that of the engine: in turn. An option of calibration selects the scores in Wanda's
   mean.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from rq_compile.errors import UserError
from rq_compile.files import Document
from rq_compile.planning.budget import allowed, over_budget
from rq_compile.planning.few_bits import check_stored, measuring
from rq_compile.planning.metrics import rank_loads
from rq_compile.planning.policies.none import unplanned
from rq_compile.planning.problem import Decision, Layer, Problem
from rq_compile.planning.schema import Slot
from rq_compile.quantization.formats import QUANTIZED_FORMATS, Format


def _quantized(format: Format) -> Format:
    if format not in QUANTIZED_FORMATS:
        raise ValueError(f"it is {' or '.join(QUANTIZED_FORMATS)}")
    return format


class Options(Document):
    format: Annotated[Format, AfterValidator(_quantized)] = "int8"
    in_place: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    skip_heavy_hitter: bool = True


def decide(problem: Problem, options: Options) -> Decision:
    """
    Raises:
        UserError: the experts of a layer were not measured in the format; or see ``_less_important``.
    """
    slots, more = [], []
    check_stored(options.format, problem.cost.target)
    for layer in problem.layers:
        if options.format not in layer.formats:
            index, known = layer.calibration.index, ", ".join(layer.formats[1:])
            choice = f"choose one of {known} with --option format, or " if known else ""
            again = measuring([*layer.formats, options.format])
            raise UserError(f"layer {index} was not measured in {options.format}; {choice}calibrate again with {again}", 2)
        chosen = _less_important(layer, problem.memory, options)
        if len(chosen) > 1:
            more.append(layer.calibration.index)
        slots.append(_slots(layer, problem, chosen, options.format))
    remarks = []
    if options.in_place == "auto" and more:
        remarks.append(
            f"In {len(more)} of {len(slots)} layers, more experts are quantized in place than the one of the paper, because the "
            f"copy's bytes, including scales, would exceed {problem.memory:g} of the layer."
        )
    return Decision(slots, remarks=remarks)


def _less_important(layer: Layer, memory: float, options: Options) -> list[int]:
    """The experts that are quantized in place.

    Raises:
        UserError: the layer's budget cannot be met, or the format cannot hold an expert.
    """
    whole, half = (layer.geometry.expert_bytes(format) for format in (layer.formats[0], options.format))
    ranking = [int(expert) for expert in np.argsort(-np.asarray(layer.calibration.wanda), kind="stable")]
    heavy = heavy_hitter(layer)
    lossy = layer.error[:, layer.formats.index(options.format)]
    if not np.isfinite(lossy).all():
        expert, index = int(np.isinf(lossy).argmax()), layer.calibration.index
        raise UserError(f"{options.format} cannot hold expert {expert} of layer {index}; use --policy optimal", 2)
    if options.skip_heavy_hitter:
        ranking = [expert for expert in ranking if expert != heavy]
    budget = allowed(memory, layer.bytes_before)
    whole_layer = layer.experts * whole
    needed = whole_layer + half - budget
    fewest = max(1, -(-needed // (whole - half))) if whole > half else 1
    count = fewest if options.in_place == "auto" else options.in_place
    count = min(count, len(ranking))
    size = whole_layer + half - count * (whole - half)
    if size > budget:
        who = f"layer {layer.calibration.index} under policy paper"
        raise over_budget(size, memory, layer.bytes_before, who, alternative=", or --policy optimal")
    return ranking[:count]


def heavy_hitter(layer: Layer) -> int:
    return int(np.argmax(layer.calibration.load))


def _slots(layer: Layer, problem: Problem, quantized: list[int], format: Format) -> list[Slot]:
    slots = [
        slot.model_copy(update={"format": format}) if slot.expert in quantized else slot
        for slot in unplanned(layer.experts, problem)
    ]
    heavy = heavy_hitter(layer)
    load = np.asarray(layer.calibration.load, np.float64)
    busy = rank_loads(load, [slot.rank for slot in slots], problem.ranks)
    if problem.ranks > 1:
        busy[slots[heavy].rank] = np.inf
    return [*slots, Slot(expert=heavy, format=format, rank=int(busy.argmin()))]
