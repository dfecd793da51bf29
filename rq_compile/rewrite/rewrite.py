"""Into graph surgeon's graphs and out of them, before and after the passes of a lowering."""

from collections import Counter
from copy import deepcopy

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from rq_compile.planning.schema import Plan
from rq_compile.rewrite.experts_to_slots import DOMAIN

# Graph surgeon warns on stderr about bf16, whose values it never has to read here.
G_LOGGER.severity = G_LOGGER.ERROR


def imported(model: onnx.ModelProto) -> gs.Graph:
    """A graph to be rewritten in place; ``model`` stays as it is, though graph surgeon takes parts of what it is given.

    An input with a default, which graph surgeon takes for a constant alone, is one among the inputs.
    """
    graph = gs.import_onnx(deepcopy(model))
    known = {tensor.name: tensor for tensor in graph.inputs} | graph.tensors()
    graph.inputs = [known[value.name] for value in model.graph.input]
    return graph


def exported(graph: gs.Graph) -> onnx.ModelProto:
    return gs.export_onnx(graph)


def exported_in_standard_ops(graph: gs.Graph) -> onnx.ModelProto:
    """``exported`` without the domain ``rq.moe``, of which no op is left: a runtime may refuse a domain that it does not know."""
    model = gs.export_onnx(graph)
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def counts(plan: Plan) -> dict[str, int]:
    """What the slots of ``plan`` replace, for the manifest."""
    slots = [slot for layer in plan.layers for slot in layer.slots]
    experts = sum(layer.geometry.experts for layer in plan.layers)
    formats = Counter(f"slots in {slot.format}" for slot in slots)
    return {"replicas added": len(slots) - experts, **formats}
