"""Policy ``none``: the checkpoint as it is, one slot per expert, ranks in consecutive blocks."""

from rq_compile.files import Document
from rq_compile.planning.placement import contiguous
from rq_compile.planning.problem import Decision, Problem
from rq_compile.planning.schema import Slot


class Options(Document):
    """This policy has no options."""


def decide(problem: Problem, options: Options) -> Decision:
    return Decision([unplanned(layer.experts, problem) for layer in problem.layers])


def unplanned(experts: int, problem: Problem) -> list[Slot]:
    """The slots of an unplanned layer, with which every plan is compared."""
    ranks = contiguous(experts, problem.ranks)
    return [Slot(expert=expert, format=problem.dtype, rank=int(rank)) for expert, rank in enumerate(ranks)]
