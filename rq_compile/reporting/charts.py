"""Converts numbers to marks. Positions are in per cent of a chart's width, so that the page's layout decides its width."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import Format
from rq_compile.reporting.maps import formats_of, tone_of

MOST_TICKS = 6


@dataclass(frozen=True)
class Scale:
    """A scale from ``least`` at 0 % to ``most`` at 100 %, with whole numbers as ticks."""

    least: float
    most: float
    ticks: list[int]

    def at(self, value: float) -> float:
        return 100 * (value - self.least) / (self.most - self.least)


def balance_scale(values: Iterable[float]) -> Scale:
    """A scale for LIS: from 1, which is perfect, to a whole number that none of ``values`` exceeds."""
    most = max(2, ceil(max(values)))
    step = ceil((most - 1) / MOST_TICKS)
    return Scale(1, most, list(range(1, most + 1, step)))


@dataclass(frozen=True)
class Segment:
    """``count`` slots of ``format`` and their bytes. The segment begins at ``start`` and is ``width`` wide, in per cent."""

    format: Format
    count: int
    bytes: int
    start: float
    width: float

    @property
    def tone(self) -> str:
        """The class of its colour."""
        return tone_of(self.format)


@dataclass(frozen=True)
class Stored:
    """One layer's slots by format. ``before`` and the ends of the segments are bytes on a common scale, in per cent."""

    layer: int
    slots: int
    replicas: int
    before: float
    bytes_before: int
    bytes_after: int
    segments: list[Segment]


def stored_layers(plan: Plan) -> list[Stored]:
    most = max(max(layer.predicted.bytes_before, layer.predicted.bytes_after) for layer in plan.layers)
    made = []
    for layer in plan.layers:
        segments, start = list[Segment](), 0.0
        for format, count in formats_of(layer.slots).items():
            taken = count * layer.geometry.expert_bytes(format)
            segments.append(Segment(format, count, taken, start, 100 * taken / most))
            start += 100 * taken / most
        made.append(
            Stored(
                layer=layer.index,
                slots=len(layer.slots),
                replicas=len(layer.slots) - layer.geometry.experts,
                before=100 * layer.predicted.bytes_before / most,
                bytes_before=layer.predicted.bytes_before,
                bytes_after=layer.predicted.bytes_after,
                segments=segments,
            )
        )
    return made


@dataclass(frozen=True)
class SlotSize:
    """Slots with the same format and size, in all layers together."""

    format: str
    bytes_each: int
    count: int

    @property
    def bytes(self) -> int:
        return self.count * self.bytes_each


def slot_sizes(plan: Plan) -> list[SlotSize]:
    """The sizes of a plan's slots, largest first."""
    counts: dict[tuple[int, str], int] = {}
    for layer in plan.layers:
        for format, count in formats_of(layer.slots).items():
            key = (layer.geometry.expert_bytes(format), format)
            counts[key] = counts.get(key, 0) + count
    return [SlotSize(format, size, count) for (size, format), count in sorted(counts.items(), reverse=True)]


@dataclass(frozen=True)
class Bar:
    """``width`` is in per cent of the longest bar of the chart."""

    name: str
    value: float
    width: float
    ours: bool


def bars(*values: tuple[str, float, bool]) -> list[Bar]:
    """Bars from (name, value, whether it belongs to the engine)."""
    most = max(value for _, value, _ in values) or 1
    return [Bar(name, value, 100 * value / most, ours) for name, value, ours in values]
