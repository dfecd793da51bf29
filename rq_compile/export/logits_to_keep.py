"""The graph input ``logits_to_keep``, exported: see ``rewrite/logits_to_keep.py``.

transformers takes a number, which tracing would make a constant, or a tensor of positions, whose rows the graph gathers. It is
traced with positions, and then rewritten to take a number, by default 1.
"""

import inspect
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes import common as passes
from transformers import PreTrainedModel

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.logits_to_keep import NAME, POSITIONS_AXIS
from rq_compile.standalone.decoding import LAST


def indices_to_trace(model: PreTrainedModel, count: int) -> dict[str, Any]:
    """The argument to trace with; none for a model that always computes all logits (an encoder-decoder)."""
    if NAME not in inspect.signature(type(model).forward).parameters:
        return {}
    return {NAME: torch.zeros(count, dtype=torch.int64, device="meta")}


def take_a_number(model: onnx_ir.Model) -> onnx_ir.Model:
    """Change the input from the traced positions to int64 ``[1]``: the number of last positions, by default ``LAST``.

    Raises:
        ContractError: the graph does not choose positions as torch's exporter is known to write it.
    """
    graph = model.graph
    number = next((value for value in graph.inputs if value.name == NAME), None)
    if number is None:
        return model
    gathers = [node for node in graph if node.op_type == "GatherND" and _comes_from(node.inputs[1], number)]
    ensures(NAME, len(gathers) == 1, "one place where positions are chosen")
    (data, _), (selected,) = gathers[0].inputs, gathers[0].outputs
    before = data.producer() if data is not None else None
    after = selected.consumers()
    ensures(NAME, [node and node.op_type for node in (before, *after)] == ["Transpose"] * 2, "a choice of the second axis")
    assert before is not None

    number.shape = onnx_ir.Shape([1])
    constants = [np.array([value], np.int64) for value in (np.iinfo(np.int64).max, POSITIONS_AXIS)]
    ends, axes = (onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(value)}) for value in constants)
    starts = onnx_ir.node("Neg", [number])
    kept = onnx_ir.node("Slice", [before.inputs[0], starts.outputs[0], ends.outputs[0], axes.outputs[0]])
    (selected,) = after[0].outputs
    kept.outputs[0].type, kept.outputs[0].shape = selected.type, selected.shape
    graph.insert_before(gathers[0], [starts, ends, axes, kept])
    selected.replace_all_uses_with(kept.outputs[0])
    tidy = onnx_ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.NameFixPass(),
    )
    model = tidy(model).model
    number.const_value = onnx_ir.tensor(np.array([LAST], np.int64), name=NAME)
    model.graph.initializers.add(number)
    return model


def _comes_from(value: onnx_ir.Value | None, source: onnx_ir.Value) -> bool:
    while value is not None and value is not source:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.inputs else None
    return value is source
