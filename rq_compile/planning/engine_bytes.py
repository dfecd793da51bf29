"""The weights file of a plan for the whole model: its bytes, and what they hold."""

from collections import Counter

from rq_compile.planning.dense import FORMATS, Whole, expert_file_bytes
from rq_compile.planning.problem import Decision, Problem


def engine_file_bytes(problem: Problem, decision: Decision) -> int:
    """Bytes of the weights file (with several ranks, of all weights files), with every tensor filled up to whole pages."""
    assert problem.whole is not None
    dense = decision.dense or [0] * len(problem.dense)
    experts = sum(
        expert_file_bytes(layer.geometry, (slot for slot in slots if slot.rank == rank), copied=problem.cost.batched)
        for layer, slots in zip(problem.layers, decision.slots, strict=True)
        for rank in range(problem.ranks)
    )
    return problem.whole.other + problem.whole.bytes_of(dense) + experts


def whole_remark(whole: Whole, problem: Problem, decision: Decision) -> str:
    dense = decision.dense or [0] * len(whole.modules)
    total, modules = engine_file_bytes(problem, decision), whole.bytes_of(dense)
    counts = Counter(FORMATS[format] for format in dense)
    formats = ", ".join(f"{counts[format]} in {format}" for format in FORMATS if counts[format])
    experts = total - modules - whole.other
    return (
        f"The engine's weights take {total / 1e6:.4g} of {whole.engine_bytes / 1e6:.4g} MB: experts {experts / 1e6:.4g} MB, "
        f"non-expert modules {modules / 1e6:.4g} MB ({formats}), other weights {whole.other / 1e6:.4g} MB."
    )
