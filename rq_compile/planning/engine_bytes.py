"""The weights file of a plan for the whole model: its bytes, and what they hold."""

from collections import Counter
from dataclasses import replace

from rq_compile.errors import UserError
from rq_compile.planning.dense import FORMATS, Whole, expert_file_bytes
from rq_compile.planning.few_bits import or_fewer_bits
from rq_compile.planning.policies import optimal
from rq_compile.planning.problem import Decision, Problem
from rq_compile.planning.schema import Slot


def decided_within(problem: Problem, options: optimal.Options) -> tuple[Problem, Decision]:
    """A decision whose weights file takes at most ``engine_bytes``, and the problem with the ``spare`` bytes that this needed.

    Raises:
        UserError: the smallest engine takes more bytes; or see ``optimal.decide``.
    """
    whole = problem.whole
    assert whole is not None
    most_spare = whole.budget - optimal.least_bytes(problem, options)
    spare = 0
    while spare <= most_spare:
        now = replace(problem, whole=replace(whole, spare=spare))
        decision = optimal.decide(now, options)
        beyond = engine_file_bytes(now, decision) - whole.engine_bytes
        if beyond <= 0:
            return now, decision
        spare = min(spare + beyond, most_spare) if spare < most_spare else most_spare + 1
    least = smallest_engine(problem, options)
    raise smallest_engine_error(least, whole.engine_bytes, or_fewer_bits(problem, least - whole.engine_bytes))


def smallest_engine_error(least: int, allowed: int, alternative: str = "") -> UserError:
    return UserError(
        f"the smallest engine takes {least} bytes, {least - allowed} more than --engine-bytes {allowed} allows; "
        f"give --engine-bytes {least} or more{alternative}",
        2,
    )


def smallest_engine(problem: Problem, options: optimal.Options) -> int:
    """Bytes of the weights file with every expert once and every module, each in its smallest format.

    Raises:
        UserError: see ``optimal.least_bytes``.
    """
    whole = problem.whole
    assert whole is not None
    tight = replace(problem, whole=replace(whole, engine_bytes=whole.other + optimal.least_bytes(problem, options)))
    unlimited = options.model_copy(update={"objective": "error", "max_error": 0.0})
    return engine_file_bytes(tight, optimal.decide(tight, unlimited))


def engine_file_bytes(problem: Problem, decision: Decision) -> int:
    """Bytes of the weights file (with several ranks, of all weights files), with every tensor filled up to whole pages."""
    assert problem.whole is not None
    dense = decision.dense or [0] * len(problem.dense)
    experts = sum(
        expert_file_bytes(layer.geometry, _of_rank(slots, rank), copied=problem.cost.batched)
        for layer, slots in zip(problem.layers, decision.slots, strict=True)
        for rank in range(problem.ranks)
    )
    return problem.whole.other + problem.whole.bytes_of(dense) + experts


def _of_rank(slots: list[Slot], rank: int) -> list[Slot]:
    """What one process stores; mean outputs are in every rank."""
    return [slot for slot in slots if slot.rank == rank or not slot.computed]


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
