"""What a pass did to a graph, and what it left although it looked alike."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

Match = dict[str, gs.Tensor]


@dataclass(frozen=True)
class NearMatch:
    """A pattern that was found in the graph, but cannot be replaced; ``why`` says so with the value."""

    why: str


@dataclass
class PassReport:
    """``found`` is what the pass looks for, in the plural; ``changed`` how many it replaced; ``left``: how many it did not, by
    reason."""

    found: str
    changed: int = 0
    left: Counter[str] = field(default_factory=Counter)

    def matched(self, found: Match | NearMatch | None) -> Match | None:
        """``found`` if it is a match, which counts as replaced; a near match is noted."""
        if isinstance(found, NearMatch):
            self.left[found.why] += 1
            return None
        self.changed += found is not None
        return found


def counts_of(reports: Iterable[PassReport]) -> dict[str, int]:
    """For the manifest: how many were replaced, by what they are, and how many were left, by reason."""
    counts: dict[str, int] = {}
    for report in reports:
        counts[f"{report.found} fused"] = report.changed
        counts |= {f"{report.found} not fused: {why}": number for why, number in sorted(report.left.items())}
    return counts
