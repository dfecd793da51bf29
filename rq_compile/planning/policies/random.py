"""Policy ``random``: no replicas, formats at random within the budget. What any policy that measures something has to beat."""

import numpy as np
from pydantic import Field

from rq_compile.files import Document
from rq_compile.planning.by_priority import all_experts, formats_by_priority
from rq_compile.planning.problem import Decision, Problem


class Options(Document):
    """``seed``: another choice."""

    seed: int = Field(default=0, ge=0, lt=2**32)


def decide(problem: Problem, options: Options) -> Decision:
    places = all_experts(problem)
    order = np.random.default_rng(options.seed).permutation(len(places))
    return Decision(formats_by_priority(problem, [places[i] for i in order]))
