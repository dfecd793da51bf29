"""Policy ``place``: move experts between ranks, without replicas, quantization or additional bytes."""

import numpy as np

from rq_compile.files import Document
from rq_compile.planning.placement import pack
from rq_compile.planning.problem import Decision, Problem
from rq_compile.planning.schema import Slot


class Options(Document):
    """This policy has no options."""


def decide(problem: Problem, options: Options) -> Decision:
    slots = []
    for layer in problem.layers:
        holds = pack(layer.demand, np.ones(layer.experts, np.int64), problem.ranks)
        slots.append([Slot(expert=int(e), format=problem.dtype, rank=int(r)) for r, e in np.argwhere(holds)])
    return Decision(slots)
