"""What calibrating or compiling a checkpoint will take, before any weight is read: disk, memory and, roughly, time.

Bytes follow from the config, the headers and the plan, and are those of the files that are then written; the graph's, a small
part, are counted by layers, slots and products. Time is arithmetic divided by ``RATES``, which are one machine's.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import work_of
from rq_compile.calibration.measure import MAX_PAIRS
from rq_compile.calibration.memory import used_memory
from rq_compile.calibration.stored import block_of
from rq_compile.errors import UserError
from rq_compile.files import Document, Name
from rq_compile.planning.budget import enough_for
from rq_compile.planning.capacity import lane_groups
from rq_compile.planning.schema import LayerPlan, Plan
from rq_compile.quantization.formats import FORMATS, QUANTIZED_FORMATS, SCALE_BYTES, Format, Quantizer, block_size, matrix_bytes
from rq_compile.rewrite.lane_weights import lane_weights
from rq_compile.rewrite.moe_layers import projection
from rq_compile.rewrite.panels import ROWS, panel_count
from rq_compile.rewrite.slot_weights import slot_weights
from rq_compile.rewrite.weights import ExternalWeight
from rq_compile.standalone.limits import usable_cpus
from rq_compile.targets.licences import licence_texts
from rq_compile.targets.manifest import DenseFormat, Lowering
from rq_compile.targets.tensorrt.narrow import HALVES
from rq_compile.targets.weights_file import ALIGNMENT

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """Of one core of a 2-core virtual machine (AMD EPYC, AVX-512), by ``benchmarks/estimates.py``. Another machine's may well be
    three times higher or lower."""

    flops: float = 60e9  # fp32 products, a second
    gptq: float = 45e6  # weights rounded, a second
    nearest: float = 240e6
    read: float = 1e9  # bytes of weights, a second, checked and converted
    start: float = 10.0  # seconds until the libraries are imported
    export: float = 5.0  # seconds to export one layer


RATES = Rates()
# Bytes of the graph: a layer's nodes, and what a slot adds in the stock lowering and a product in the batched one.
GRAPH_LAYER, GRAPH_SLOT, GRAPH_PRODUCT = 16_500, 4_500, 8_200
MANIFEST = 3_000  # and the plan
# Bytes of a number on a line of its own in an indented JSON file, and what a layer has beside its numbers.
JSON_NUMBER, JSON_SUM, JSON_LAYER = 14, 22, 1000
# Measured: what the libraries and the exported graph of a small model hold.
PROGRAM = 600 * 2**20


class Estimate(Document):
    """``outputs``: bytes of each file that is written. ``temporary_bytes``: what files in the temporary folder take meanwhile.
    ``memory_bytes``: about the most that is held. ``seconds``: rough, on ``cores`` cores of the machine that ``rates`` tell."""

    kind: Literal["estimate"] = "estimate"
    outputs: dict[Name, int]
    temporary_bytes: int
    memory_bytes: int
    seconds: float
    cores: int
    rates: dict[str, float] = Field(default=vars(RATES))
    remarks: list[str] = Field(default=[])

    @property
    def output_bytes(self) -> int:
        return sum(self.outputs.values())


def calibration_estimate(
    model: Model,
    texts: dict[str, str],
    output: Path,
    *,
    batch_size: int,
    sequence_length: int,
    quantizer: Quantizer = "gptq",
    memory_limit: int | None = None,
    device: str = "cpu",
) -> Estimate:
    """What ``calibrate`` with these arguments takes; the texts are tokenized.

    Raises:
        UserError: see ``work_of``.
    """
    work = work_of(model, texts, batch_size=batch_size, sequence_length=sequence_length, memory_limit=memory_limit, device=device)
    layers, way = work.layers, work.way
    outputs = {output.name: sum(_layer_json(layer, len(texts), len(work.batches)) for layer in layers)}
    statistics = sum(_statistics_bytes(layer) for layer in layers) if quantizer == "gptq" else 0
    if statistics:
        outputs[output.with_suffix(".safetensors").name] = statistics
    hidden = [layer.geometry.hidden for layer in layers]
    # Layer by layer every token's inputs are kept, of one layer and of that before it.
    recorded = 4 * (work.measured * sum(hidden) if way.whole else 2 * work.total * max(hidden))
    states = 0 if way.states_in_memory else 12 * work.rows * max(hidden)
    return Estimate(
        outputs=outputs,
        temporary_bytes=recorded + states + statistics,
        memory_bytes=used_memory() + way.memory,
        cores=usable_cpus(),
        seconds=_calibration_seconds(model, layers, work.rows, work.measured, quantizer),
        remarks=[way.reason],
    )


def engine_estimate(
    model: Model,
    output: Path,
    lowering: Lowering,
    *,
    plan: Plan | None,
    memory: float | None = None,
    dense_format: DenseFormat = "stored",
    link_weights: bool = False,
    threads: int | None = None,
) -> Estimate:
    """What ``compile_engine`` takes; without a ``plan`` that of one which uses all of ``memory`` times the experts' bytes
    (None: see ``make_plan``).

    Raises:
        UserError: see ``moe_layers`` and ``meta_model``.
    """
    layers = model.layers
    dense = _dense_sizes(model, dense_format if lowering == "native" else "fp32", link_weights)
    experts = [weight.bytes for layer in plan.layers for weight in expert_weights(layer, lowering)] if plan else []
    data = sum(size + -size % ALIGNMENT for size in dense + experts)
    if memory is None:
        memory = max(1.0, enough_for(sum(_least_bytes(model, layer) for layer in model.layers), model.expert_bytes))
    if plan is None:
        data += int(memory * model.expert_bytes)
    outputs = {output.name: _graph_bytes(layers, plan, lowering), f"{output.name}.data": data}
    outputs[output.with_suffix(".json").name] = MANIFEST + (len(plan.model_dump_json(indent=1)) if plan else 0)
    if model.has_tokenizer:
        outputs[output.with_suffix(".tokenizer.json").name] = len(model.tokenizer.to_str().encode())
    for file in licence_texts(model.path):
        outputs[output.with_suffix(f".{file.name}").name] = file.stat().st_size
    # Pieces in flight take as much as the largest layer; a single dense tensor may be more.
    threads = threads or usable_cpus()
    return Estimate(
        outputs=outputs,
        temporary_bytes=0,
        memory_bytes=PROGRAM + max(model.largest_layer_bytes, 2 * max(dense)),
        cores=threads,
        seconds=RATES.start + RATES.export * len(layers) + data / RATES.read + _quantizing_seconds(layers, plan) / threads,
        remarks=[] if plan else [f"there is no plan yet: the experts are taken to fill --memory {memory:g}"],
    )


def _least_bytes(model: Model, layer: MoeLayer) -> int:
    """Of a layer's experts, each once in the smallest format."""
    geometry = layer.geometry.model_copy(update={"block": block_of(model.stored_experts(layer))})
    return geometry.experts * geometry.expert_bytes("int4")


def together(first: Estimate, second: Estimate) -> Estimate:
    """Of two stages, one after the other in one process: what the first leaves is temporary."""
    return second.model_copy(
        update={
            "temporary_bytes": max(first.temporary_bytes, second.temporary_bytes),
            "memory_bytes": max(first.memory_bytes, second.memory_bytes),
            "seconds": first.seconds + second.seconds,
            "remarks": [*first.remarks, *second.remarks],
        }
    )


def check_space(output: Path, needed: int) -> None:
    """
    Raises:
        UserError: the file system of ``output`` has less than ``needed`` bytes free; what is left of an interrupted
            compilation counts as free.
    """
    partial = output.with_name(f".{output.name}.data.partial")
    free = shutil.disk_usage(output.parent).free + (partial.stat().st_blocks * 512 if partial.exists() else 0)
    if free < needed:
        raise UserError(
            f"the engine takes {needed / GIB:.2f} GiB, but {output.parent} has {free / GIB:.2f} GiB free; "
            "free space or choose another output with -o",
            2,
        )


def expert_weights(plan: LayerPlan, lowering: Lowering) -> list[ExternalWeight]:
    """The weights of a layer's slots, as the lowering lays them out; none is read."""
    if lowering == "cuda":
        projections = [projection(plan, name, _unread, HALVES["fp16"]) for name in ("up", "down")]
        return [weight for held in projections for weight in held.inputs if weight]
    if lowering != "batched":
        projections = [slot_weights(plan, name, _unread, panels=lowering == "native") for name in ("up", "down")]
        return [weight for held in projections for weight in held.inputs if weight]
    groups = lane_groups(plan.slots)
    lanes = [[slot for slot, group in zip(plan.slots, groups, strict=True) if group == number] for number in sorted(set(groups))]
    return [weight for slots in lanes for p in ("up", "down") for weight in lane_weights(plan, slots, "", p, _unread).all]


def _unread(layer: str, expert: int) -> Any:
    raise AssertionError(f"expert {expert} of {layer} is not to be read")


def _dense_sizes(model: Model, dense_format: DenseFormat, link_weights: bool) -> list[int]:
    """Bytes of each weight beside the experts, in the form that ``dense_gemms`` gives it. A tied embedding is there twice: a
    product wants it in another order than a table."""
    empty = model.without_weights
    matrices, tables = (
        {f"{name}.weight" for name, module in empty.named_modules() if isinstance(module, kind)}
        for kind in (nn.Linear, nn.Embedding)
    )
    sizes: dict[tuple[str, bool], tuple[int, ...]] = {}
    for name in model.names:
        shape, dtype = model.shape(name), model.dtype_of(name)
        halved = dense_format != "fp32" and dtype.itemsize == 2
        size: tuple[int, ...] = (math.prod(shape) * (2 if halved and name in tables else 4),)
        if name in matrices and shape[0] >= ROWS and (halved or dense_format == "int8"):
            format: Format = "int8" if dense_format == "int8" else "bf16"
            rows, columns = ROWS * panel_count(shape[0], 1), shape[1]
            scales = SCALE_BYTES * rows * -(-columns // block_size(columns)) if format == "int8" else 0
            size = (matrix_bytes(format, rows, columns) - scales, scales)
        elif link_weights and name not in matrices and size[0] == math.prod(shape) * dtype.itemsize:
            continue
        sizes[model.tensor(name), name in matrices] = size
    return [size for parts in sizes.values() for size in parts]


def _graph_bytes(layers: Sequence[MoeLayer], plan: Plan | None, lowering: Lowering) -> int:
    if plan:
        slots = sum(len(planned.slots) for planned in plan.layers)
        products = sum(len(set(lane_groups(planned.slots).tolist())) for planned in plan.layers)
    else:
        slots = sum(layer.geometry.experts for layer in layers)
        products = len(FORMATS) * len(layers)
    added: dict[Lowering, int] = {"native": 0, "cuda": 0, "stock": GRAPH_SLOT * slots, "batched": GRAPH_PRODUCT * products}
    return GRAPH_LAYER * len(layers) + added[lowering]


def _statistics_bytes(layer: MoeLayer) -> int:
    geometry = layer.geometry
    block = block_size(geometry.intermediate)
    return 4 * (geometry.hidden**2 + geometry.experts * -(-geometry.intermediate // block) * block**2)


def _layer_json(layer: MoeLayer, texts: int, batch_count: int) -> int:
    """Bytes that a calibration holds of one layer: loads, scores and errors of each expert, and the sums behind them."""
    numbers, sums = 2 + texts + batch_count + len(FORMATS), 2 + 2 * len(FORMATS)
    return JSON_LAYER + layer.geometry.experts * (JSON_NUMBER * numbers + JSON_SUM * sums)


def _calibration_seconds(model: Model, layers: Sequence[MoeLayer], rows: int, measured: int, quantizer: Quantizer) -> float:
    """Every token through the model; every expert rounded; what was routed to it through it, as it is and rounded."""
    stored = model.parameter_count
    held = sum(_expert_size(layer) * layer.geometry.experts for layer in layers)
    active = stored - held + sum(_expert_size(layer) * layer.geometry.top_k for layer in layers)
    products = 2.0 * active * rows
    for layer in layers:
        pairs = measured * layer.geometry.top_k
        products += 2.0 * _expert_size(layer) * (pairs + min(pairs, MAX_PAIRS * layer.geometry.experts) * len(QUANTIZED_FORMATS))
    rounding = held * len(QUANTIZED_FORMATS) / (RATES.gptq if quantizer == "gptq" else RATES.nearest)
    return RATES.start + 4 * stored / RATES.read + (products / RATES.flops + rounding) / usable_cpus()


def _quantizing_seconds(layers: Sequence[MoeLayer], plan: Plan | None) -> float:
    """On one core; without a plan, of every expert."""
    if plan is None:
        return sum(_expert_size(layer) * layer.geometry.experts for layer in layers) / RATES.gptq
    rate = RATES.gptq if plan.quantizer == "gptq" else RATES.nearest
    sizes = {layer.name: _expert_size(layer) for layer in layers}
    quantized = sum(sizes[layer.name] for layer in plan.layers for slot in layer.slots if slot.format in QUANTIZED_FORMATS)
    return quantized / rate


def _expert_size(layer: MoeLayer) -> int:
    return layer.geometry.hidden * (layer.geometry.up_rows + layer.geometry.intermediate)
