"""Estimates the cost of compiling an ONNX Runtime engine before any weight is read."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.calibration.stored import block_of, formats_to_measure
from rq_compile.engine.paths import graph_of_rank, manifest_path, stem_of, weights_of
from rq_compile.estimates import RATES, Estimate
from rq_compile.lowerings import Lowering, lowering_of
from rq_compile.planning.budget import enough_for
from rq_compile.planning.capacity import lane_groups
from rq_compile.planning.schema import Plan
from rq_compile.quantization.dense_layout import quantized_parts
from rq_compile.quantization.formats import (
    COMPUTED_FORMATS,
    QUANTIZED_FORMATS,
    SCALE_BYTES,
    SLOT_FORMATS,
    DenseFormat,
    Format,
    block_size,
)
from rq_compile.rewrite.exchange import slots_of
from rq_compile.rewrite.panels import ROWS, panel_count
from rq_compile.standalone.limits import usable_cpus
from rq_compile.targets.licences import licence_texts
from rq_compile.targets.weights_file import ALIGNMENT

MANIFEST = 3_000  # and the plan
# Measured: memory of the libraries and of the exported graph of a small model.
PROGRAM = 600 * 2**20


def engine_estimate(
    model: Model,
    output: Path,
    lowering: Lowering | str,
    *,
    plan: Plan | None,
    memory: float | None = None,
    engine_bytes: int | None = None,
    link_weights: bool = False,
    threads: int | None = None,
) -> Estimate:
    """The estimate of ``compile_engine``. Without a ``plan``, the plan is assumed to use all of ``engine_bytes`` or, without it,
    of ``memory`` times the experts' bytes (None: see ``make_plan``).

    Raises:
        UserError: see ``moe_layers`` and ``meta_model``.
    """
    layers, lowering = model.layers, lowering_of(lowering)
    dense = _dense_sizes(model, lowering.dense_format, link_weights, plan)
    experts = [weight.bytes for layer in plan.layers for weight in lowering.expert_weights(layer)] if plan else []
    data = sum(size + -size % ALIGNMENT for size in dense + experts)
    processes = plan.ranks if plan and lowering.of_ranks else 1
    if memory is None:
        memory = max(1.0, enough_for(sum(_least_bytes(model, layer) for layer in model.layers), model.expert_bytes))
    assumed = f"the experts are assumed to fill --memory {memory:g}"
    if plan is None and engine_bytes is not None:
        data, assumed = engine_bytes, f"the weights are assumed to fill --engine-bytes {engine_bytes}"
    elif plan is None:
        data += int(memory * model.expert_bytes)
    stem = stem_of(output)
    outputs = {weights_of(stem).name: data}
    for rank in range(processes):
        graph = graph_of_rank(output, rank) if lowering.of_ranks else stem
        outputs[graph.name] = _graph_bytes(layers, plan, lowering)
    if plan and lowering.of_ranks:
        outputs |= {weights_of(graph_of_rank(output, rank)).name: size for rank, size in enumerate(_of_ranks(plan, lowering))}
        outputs[weights_of(stem).name] -= sum(_of_ranks(plan, lowering))
    outputs[manifest_path(output).name] = MANIFEST + (len(plan.model_dump_json(indent=1)) if plan else 0)
    if model.has_tokenizer:
        outputs[stem.with_suffix(".tokenizer.json").name] = len(model.tokenizer.to_str().encode())
    if model.chat_template is not None:
        outputs[stem.with_suffix(".chat_template.jinja").name] = len(model.chat_template.encode())
    for file in licence_texts(model.path):
        outputs[stem.with_suffix(f".{file.name}").name] = file.stat().st_size
    # Pieces in flight take as much memory as the largest layer; a single dense tensor may take more.
    threads = threads or usable_cpus()
    return Estimate(
        outputs=outputs,
        temporary_bytes=0,
        memory_bytes=PROGRAM + max(model.largest_layer_bytes, 2 * max(dense)),
        cores=threads,
        seconds=RATES.start + RATES.export * len(layers) + data / RATES.read + _quantizing_seconds(layers, plan) / threads,
        remarks=[] if plan else [f"there is no plan yet: {assumed}"],
    )


def _of_ranks(plan: Plan, lowering: Lowering) -> list[int]:
    """Bytes of the experts of each rank, as they lie in the file."""
    return [
        sum(
            weight.bytes + -weight.bytes % ALIGNMENT
            for layer in plan.layers
            for weight in lowering.expert_weights(slots_of(layer, rank))
        )
        for rank in range(plan.ranks)
    ]


def _least_bytes(model: Model, layer: MoeLayer) -> int:
    """Bytes of a layer's experts, each once in the smallest format."""
    geometry = layer.geometry.model_copy(update={"block": block_of(model.stored_experts(layer))})
    formats = formats_to_measure(model, [replace(layer, geometry=geometry)])
    return geometry.experts * min(map(geometry.expert_bytes, formats))


def _dense_sizes(model: Model, dense_format: DenseFormat, link_weights: bool, plan: Plan | None) -> list[int]:
    """Bytes of each non-expert weight, in the layout of ``dense_gemms``. A tied embedding counts twice, because a product needs
    another layout than a table. Those that multiply one tensor are written together, which saves the ends of pages."""
    planned = {matrix.name: module.format for module in plan.dense for matrix in module.matrices} if plan else {}
    empty = model.without_weights
    matrices, tables = (
        {f"{name}.weight" for name, module in empty.named_modules() if isinstance(module, kind)}
        for kind in (nn.Linear, nn.Embedding)
    )
    head = next((f"{name}.weight" for name, module in empty.named_modules() if module is empty.get_output_embeddings()), None)
    sizes: dict[tuple[str, bool], tuple[int, ...]] = {}
    for name in model.names:
        shape, dtype = model.shape(name), model.dtype_of(name)
        halved = dense_format != "fp32" and dtype.itemsize == 2
        size: tuple[int, ...] = (math.prod(shape) * (2 if halved and name in tables else 4),)
        if (rounded := planned.get(name, "stored")) != "stored":
            panels = name in matrices and dense_format != "fp32"
            size = quantized_parts(ROWS * panel_count(shape[0], 1) if panels else shape[0], shape[1], rounded)
        elif name in matrices and shape[0] >= ROWS and (halved or dense_format in QUANTIZED_FORMATS):
            format: Format = "bf16"
            if dense_format in QUANTIZED_FORMATS:
                format = "int8" if name == head else dense_format
            rows, columns = ROWS * panel_count(shape[0], 1), shape[1]
            scales = SCALE_BYTES * rows * -(-columns // block_size(columns)) if SLOT_FORMATS[format].quantized else 0
            size = (SLOT_FORMATS[format].matrix_bytes(rows, columns) - scales, scales)
        elif link_weights and name not in matrices and size[0] == math.prod(shape) * dtype.itemsize:
            continue
        sizes[model.tensor(name), name in matrices] = size
    return [size for parts in sizes.values() for size in parts]


def _graph_bytes(layers: Sequence[MoeLayer], plan: Plan | None, lowering: Lowering) -> int:
    if plan:
        slots = sum(len(planned.slots) for planned in plan.layers)
        products = sum(len(set(lane_groups(planned.without_constants.slots).tolist())) for planned in plan.layers)
    else:
        slots = sum(layer.geometry.experts for layer in layers)
        products = len(COMPUTED_FORMATS) * len(layers)
    return lowering.layer_bytes * len(layers) + lowering.graph_bytes(slots, products)


def _quantizing_seconds(layers: Sequence[MoeLayer], plan: Plan | None) -> float:
    """Seconds of rounding on one core; without a plan, for every expert."""
    if plan is None:
        return sum(layer.geometry.expert_weights * layer.geometry.experts for layer in layers) / RATES.gptq
    rate = RATES.gptq if plan.quantizer == "gptq" else RATES.nearest
    sizes = {layer.name: layer.geometry.expert_weights for layer in layers}
    quantized = sum(sizes[layer.name] for layer in plan.layers for slot in layer.slots if slot.format in QUANTIZED_FORMATS)
    return quantized / rate
