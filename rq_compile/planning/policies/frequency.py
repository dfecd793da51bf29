"""Policy ``frequency``: no replicas; the busier an expert, the more bits it keeps. A baseline: load instead of measured error."""

from rq_compile.files import Document
from rq_compile.planning.by_priority import Place, all_experts, formats_by_priority
from rq_compile.planning.problem import Decision, Problem


class Options(Document):
    """None."""


def decide(problem: Problem, options: Options) -> Decision:
    def load(place: Place) -> float:
        position, expert = place
        layer = problem.layers[position].calibration
        return layer.load[expert] / max(sum(layer.load), 1)

    # sorted() is stable: of equal loads, the first layer's first expert.
    return Decision(formats_by_priority(problem, sorted(all_experts(problem), key=load, reverse=True)))
