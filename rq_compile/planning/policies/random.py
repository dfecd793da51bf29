"""Policy ``random``: no replicas, random formats within the budget. A baseline that any policy with measurements should beat."""

import numpy as np
from pydantic import Field

from rq_compile.files import Document
from rq_compile.planning.by_priority import all_experts, formats_by_priority
from rq_compile.planning.problem import Decision, Problem


class Options(Document):
    """``seed``: seed of the random choice."""

    seed: int = Field(default=0, ge=0, lt=2**32)


def decide(problem: Problem, options: Options) -> Decision:
    places = all_experts(problem)
    order = np.random.default_rng(options.seed).permutation(len(places))
    return Decision(formats_by_priority(problem, [places[i] for i in order]))
