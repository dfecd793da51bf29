"""Constant experts: their mean outputs as inputs of Combine, or added to the output of a layer in standard ops.

A layer's slots in ``constant`` come last and compute nothing. Wherever one of their pairs would get its expert's output, it gets
the expert's mean output, weighted by its gate as always.
"""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.errors import UserError
from rq_compile.planning.schema import LayerPlan
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.slot_weights import Source
from rq_compile.rewrite.weights import ExternalWeight, Piece, Section, constant


def places_of(plan: LayerPlan) -> np.ndarray:
    """int32 ``[m]``: the row of each expert in the layer's mean outputs; -1 if it is computed."""
    places = np.full(plan.geometry.experts, -1, np.int32)
    places[plan.constant_experts] = np.arange(len(plan.constant_experts))
    return places


def mean_outputs(plan: LayerPlan) -> ExternalWeight:
    """fp32 ``[constant experts, hidden]``."""
    return ExternalWeight(f"{plan.name}.mean_outputs", np.dtype(np.float32), (len(plan.constant_experts), plan.geometry.hidden))


def mean_output_sections(plans: Sequence[LayerPlan], source: Source) -> list[Section]:
    """The mean outputs of every layer that has constant experts, unread."""
    return [_section(plan, source) for plan in plans if plan.constant_experts]


def _section(plan: LayerPlan, source: Source) -> Section:
    weight = mean_outputs(plan)

    def computed() -> tuple[np.ndarray, ...]:
        return (np.stack([_mean_output(plan, expert, source) for expert in plan.constant_experts]),)

    return Section(weight.name, (weight,), (Piece((weight,), computed, 2 * weight.bytes),))


def _mean_output(plan: LayerPlan, expert: int, source: Source) -> np.ndarray:
    mean = source(plan.name, expert).mean_output
    if mean is None:
        raise no_mean_output(plan, expert)
    return mean


def no_mean_output(plan: LayerPlan, expert: int) -> UserError:
    return UserError(
        f"the plan replaces expert {expert} of layer {plan.index} by its mean output, which was not measured; calibrate with "
        "constant among --formats and plan again",
        2,
    )


def combine_inputs(plan: LayerPlan, ids: gs.Tensor) -> list[gs.Tensor]:
    """The further inputs of Combine in a layer with constant experts: ``ids``, ``places`` and ``outputs``."""
    if not plan.constant_experts:
        return []
    return [ids, gs.Constant(f"{plan.name}.places", places_of(plan)), constant(mean_outputs(plan))]


def constant_part(op: Ops, plan: LayerPlan, ids: gs.Tensor, gates: gs.Tensor) -> gs.Tensor:
    """float ``[T, hidden]``: what the constant experts add to the layer's output, in standard ops."""
    chosen = op("Equal", op("Unsqueeze", ids, [2]), np.array(plan.constant_experts, np.int64))
    weighted = op("Where", chosen, op("Unsqueeze", gates, [2]), np.float32(0))
    return op("MatMul", op("ReduceSum", weighted, [1], keepdims=0), constant(mean_outputs(plan)))
