"""Policy ``frequency``: no replicas; busier experts get more bits. A baseline that uses the load instead of measured errors."""

from rq_compile.files import Document
from rq_compile.planning.by_priority import Place, all_experts, formats_by_priority
from rq_compile.planning.problem import Decision, Problem


class Options(Document):
    """This policy has no options."""


def decide(problem: Problem, options: Options) -> Decision:
    def load(place: Place) -> float:
        position, expert = place
        layer = problem.layers[position].calibration
        return layer.load[expert] / max(sum(layer.load), 1)

    # sorted() is stable: among equal loads, the first expert of the first layer comes first.
    return Decision(formats_by_priority(problem, sorted(all_experts(problem), key=load, reverse=True)))
