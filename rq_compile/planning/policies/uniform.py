"""Policy ``uniform``: all experts in one format and no replicas, like most quantized checkpoints. A baseline."""

from pydantic import Field

from rq_compile.errors import UserError
from rq_compile.files import Document
from rq_compile.planning.by_priority import one_slot_each
from rq_compile.planning.few_bits import check_stored, or_measure
from rq_compile.planning.problem import Decision, Problem
from rq_compile.quantization.formats import SLOT_FORMATS


class Options(Document):
    """``format``: the format of all experts; empty means the largest that the budget allows."""

    format: str = Field(default="", max_length=16)


def decide(problem: Problem, options: Options) -> Decision:
    """
    Raises:
        UserError: the experts of a layer were not measured in the format.
    """
    name = options.format or _largest(problem)
    for layer in problem.layers:
        if name not in layer.formats:
            check_stored(name, problem.cost.target)
            raise UserError(
                f"layer {layer.calibration.index} was not measured in {name}, but in {', '.join(layer.formats)}; "
                f"choose one of these with --option format{or_measure(problem, name)}",
                2,
            )
    return Decision(one_slot_each(problem, lambda position, _: problem.layers[position].formats.index(name)))


def _largest(problem: Problem) -> str:
    """The largest of the common formats that fits, or the smallest one, which the budget then refuses."""
    common = [
        format
        for format in problem.layers[0].formats
        if SLOT_FORMATS[format].computed and all(format in layer.formats for layer in problem.layers)
    ]

    def taken(format: str) -> int:
        return sum(layer.experts * int(layer.size[layer.formats.index(format)]) for layer in problem.layers)

    def error(format: str) -> float:
        return sum(float(layer.error[:, layer.formats.index(format)].sum()) for layer in problem.layers)

    fitting = [format for format in common if taken(format) <= problem.budget]
    return max(fitting, key=lambda format: (taken(format), -error(format))) if fitting else min(common, key=taken)
