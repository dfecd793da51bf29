"""Formats that a calibration may not have measured, as a way out where they would help."""

from collections.abc import Iterable

from rq_compile.errors import UserError
from rq_compile.planning.problem import Problem, held_wider
from rq_compile.planning.schema import Target
from rq_compile.quantization.formats import BLOCK_FORMATS, MEASURABLE_FORMATS, MEASURED_FORMATS, SLOT_FORMATS


def check_stored(name: str, target: Target) -> None:
    """
    Raises:
        UserError: engines for ``target`` store the format ``name`` in more bits.
    """
    if name in held_wider(target):
        raise UserError(f"engines for {target} store {name} as int4, so a plan gains nothing by it; choose int4", 2)


def or_measure(problem: Problem, name: str) -> str:
    """The end of a message: how to measure the format ``name``. Empty if no calibration can."""
    return f", or calibrate again with {measuring([*problem.layers[0].formats, name])}" if name in MEASURABLE_FORMATS else ""


def or_fewer_bits(problem: Problem, excess: int) -> str:
    """The end of a message: which formats would save ``excess`` bytes if they were measured. Empty if none would."""
    known = problem.layers[0].formats
    bits, useless = SLOT_FORMATS[known[0]].bits, (*known, *held_wider(problem.cost.target))
    more = [name for name, kept in BLOCK_FORMATS.items() if kept.bits < bits and name not in useless]
    for count, name in enumerate(more, 1):
        saved = sum(layer.experts * (int(layer.size.min()) - layer.geometry.expert_bytes(name)) for layer in problem.layers)
        if saved >= excess:
            return f", or calibrate again with {measuring([*known, *more[:count]])}"
    return ""


def measuring(formats: Iterable[str]) -> str:
    """The option of ``calibrate`` that measures ``formats`` beside those that are always measured."""
    asked = {*MEASURED_FORMATS, *formats}
    return f"--formats {','.join(name for name in MEASURABLE_FORMATS if name in asked)}"
