"""Converts to and from graph surgeon's graphs, before and after the passes of a lowering."""

from collections import Counter
from copy import deepcopy

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from rq_compile.engine.library import OP_SET_VERSION
from rq_compile.planning.schema import Plan
from rq_compile.rewrite.exchange import EXCHANGE_DOMAIN
from rq_compile.rewrite.experts_to_slots import DOMAIN

# Graph surgeon warns on stderr about bf16, whose values it never has to read here.
G_LOGGER.severity = G_LOGGER.ERROR


def imported(model: onnx.ModelProto) -> gs.Graph:
    """A graph that can be rewritten in place. ``model`` is not changed, although graph surgeon reuses parts of its input.

    An input with a default value stays an input, although graph surgeon reads it as a constant.
    """
    graph = gs.import_onnx(deepcopy(model))
    known = {tensor.name: tensor for tensor in graph.inputs} | graph.tensors()
    graph.inputs = [known[value.name] for value in model.graph.input]
    return graph


def exported(graph: gs.Graph) -> onnx.ModelProto:
    """The model. It imports our op sets only if it has a node of them, because a runtime may not know the domains."""
    model = gs.export_onnx(graph)
    known = (DOMAIN, EXCHANGE_DOMAIN)
    others = [entry for entry in model.opset_import if entry.domain not in known]
    used = {node.domain for node in graph.nodes}
    ours = [onnx.helper.make_opsetid(domain, OP_SET_VERSION) for domain in known if domain in used]
    del model.opset_import[:]
    model.opset_import.extend([*others, *ours])
    return model


def counts(plan: Plan) -> dict[str, int]:
    """Counts of what the slots of ``plan`` replace, for the manifest."""
    slots = [slot for layer in plan.layers for slot in layer.slots]
    experts = sum(layer.geometry.experts for layer in plan.layers)
    formats = Counter(f"slots in {slot.format}" for slot in slots)
    return {"replicas added": len(slots) - experts, **formats}
