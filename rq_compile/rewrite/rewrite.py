"""From the exported graph to an engine's graph: which passes run for which lowering, in which order."""

from collections import Counter
from copy import deepcopy

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from rq_compile.planning.schema import Plan
from rq_compile.rewrite.attention import attention
from rq_compile.rewrite.batched_experts import ExpectedCapacity, batched_experts
from rq_compile.rewrite.experts_to_slots import DOMAIN, experts_to_slots
from rq_compile.rewrite.moe_layers import moe_layers
from rq_compile.rewrite.rms_norms import rms_norms
from rq_compile.rewrite.rotary_embeddings import rotary_embeddings
from rq_compile.rewrite.slot_weights import Source
from rq_compile.rewrite.stock_combine import stock_combine
from rq_compile.rewrite.stock_dispatch import stock_dispatch
from rq_compile.rewrite.stock_experts import stock_experts
from rq_compile.rewrite.weights import Section
from rq_compile.targets.manifest import CpuLowering

# Graph surgeon warns on stderr about bf16, whose values it never has to read here.
G_LOGGER.severity = G_LOGGER.ERROR


def rewrite(
    model: onnx.ModelProto,
    plan: Plan,
    source: Source,
    lowering: CpuLowering,
    *,
    activation_bits: int = 32,
    expected: ExpectedCapacity | None = None,
    whole_columns: bool = False,
) -> tuple[onnx.ModelProto, list[Section], dict[str, int]]:
    """Put the plan's slots in place of every Experts node of ``model``.

    ``activation_bits``: 8 lets the native and stock lowerings round to int8 what they multiply with quantized weights, 32 keeps
    it in fp32. ``expected`` and ``whole_columns`` are the batched lowering's, see ``batched_experts``. Returns the new model, the
    expert weights it refers to (a section for each layer, not read yet) and counts of what was replaced.

    Raises:
        UserError: the layers of the plan and of the model differ.
        ContractError: a pass is at fault.
    """
    # Graph surgeon adds domains to the list of the model that it was given.
    graph = gs.import_onnx(deepcopy(model))
    sections = experts_to_slots(graph, plan.layers, source, panels=lowering == "native", activation_bits=activation_bits)
    if lowering == "native":
        rms_norms(graph)
        rotary_embeddings(graph)
        attention(graph)
    else:
        stock_dispatch(graph)
        stock_combine(graph)
    if lowering == "stock":
        stock_experts(graph, plan.layers, accuracy_level=4 if activation_bits == 8 else 0)
    elif lowering == "batched":
        sections = batched_experts(graph, plan.layers, source, expected, whole_columns=whole_columns)
    rewritten = gs.export_onnx(graph)
    if lowering != "native":
        # None of the op set is left, and a runtime may refuse a domain that it does not know.
        kept = [entry for entry in rewritten.opset_import if entry.domain != DOMAIN]
        del rewritten.opset_import[:]
        rewritten.opset_import.extend(kept)
    return rewritten, sections, _counts(plan)


def rewrite_to_moe_layers(
    model: onnx.ModelProto, plan: Plan, source: Source, half: np.dtype
) -> tuple[onnx.ModelProto, list[Section], dict[str, int]]:
    """``rewrite`` for the libraries whose op is a whole layer, ``rq.moe::MoeLayer`` in ``half`` (float16 or bfloat16).

    Raises:
        UserError: the layers of the plan and of the model differ.
        ContractError: a pass is at fault.
    """
    graph = gs.import_onnx(deepcopy(model))
    sections = moe_layers(graph, plan.layers, source, half)
    return gs.export_onnx(graph), sections, _counts(plan)


def _counts(plan: Plan) -> dict[str, int]:
    slots = [slot for layer in plan.layers for slot in layer.slots]
    experts = sum(layer.geometry.experts for layer in plan.layers)
    formats = Counter(f"slots in {slot.format}" for slot in slots)
    return {"experts nodes rewritten": len(plan.layers), "replicas added": len(slots) - experts, **formats}
