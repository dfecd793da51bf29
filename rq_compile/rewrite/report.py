"""The report of a pass, which every pass returns: what it changed in a graph, and similar structures that it left."""

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
    """``found`` names what the pass searches for, in the plural, and ``done`` what it does with it.

    ``changed`` counts the matches that it changed, ``left`` those that it did not, by reason.
    """

    found: str
    done: str = "fused"
    changed: int = 0
    left: Counter[str] = field(default_factory=Counter)

    @property
    def matches(self) -> int:
        return self.changed + self.left.total()

    def leave(self, why: str, count: int = 1) -> None:
        self.left[why] += count

    def matched(self, found: Match | NearMatch | None) -> Match | None:
        """``found`` if it is a match, which counts as changed; a near match is noted."""
        if isinstance(found, NearMatch):
            self.leave(found.why)
            return None
        self.changed += found is not None
        return found


def counts_of(reports: Iterable[PassReport]) -> dict[str, int]:
    """For the manifest: how many each pass changed, 0 included, and how many it left, by reason."""
    counts: dict[str, int] = {}
    for report in reports:
        counts[f"{report.found} {report.done}"] = report.changed
        counts |= {f"{report.found} not {report.done}: {why}": number for why, number in sorted(report.left.items())}
    return counts
