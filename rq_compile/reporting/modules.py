"""Non-expert modules in tables, for plans that decide their formats."""

from collections import Counter
from dataclasses import dataclass

from rq_compile.architectures.dense_kinds import DenseKind
from rq_compile.planning.dense import FORMATS
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import PlannedDense


@dataclass(frozen=True)
class ModuleKind:
    """All modules of a kind together. ``formats``: number of modules by format. ``error`` in nats."""

    kind: DenseKind
    formats: dict[PlannedDense, int]
    bytes_stored: int
    bytes: int
    error: float


def module_kinds(plan: Plan) -> list[ModuleKind]:
    """The kinds of modules, in the order of the plan."""
    made = []
    for kind in dict.fromkeys(module.kind for module in plan.dense):
        of_kind = [module for module in plan.dense if module.kind == kind]
        counts = Counter(module.format for module in of_kind)
        made.append(
            ModuleKind(
                kind=kind,
                formats={format: counts[format] for format in FORMATS if counts[format]},
                bytes_stored=sum(module.bytes_stored for module in of_kind),
                bytes=sum(module.bytes for module in of_kind),
                error=sum(module.error for module in of_kind),
            )
        )
    return made
