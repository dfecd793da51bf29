"""What a plan has to say to the person who asked for it, a sentence each."""

from rq_compile.planning.problem import Problem
from rq_compile.planning.schema import LayerPlan


def remarks(problem: Problem, layers: list[LayerPlan]) -> list[str]:
    said = []
    replicas = sum(len(layer.slots) - layer.geometry.experts for layer in layers)
    if problem.cost.busiest == "nothing" and not replicas:
        said.append(
            f"On {problem.cost.target} with one rank a replica is an alias that saves no time, so no expert is copied and the "
            "memory is spent on bits; plan with --target batched or --ranks to balance the load."
        )
    changed = replicas or any(slot.format != problem.dtype for layer in layers for slot in layer.slots)
    if not changed and problem.ranks == 1:
        said.append("This plan changes nothing: every expert keeps its one slot in the checkpoint's format.")
    unreached = sum(len(layer.unreached) for layer in layers)
    if unreached:
        said.append(f"{unreached} experts were reached by no calibration token; each keeps a slot, planned for by smoothing.")
    return said
