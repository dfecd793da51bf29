"""Curves of a sweep over the bytes of the experts or of the engine, with positions in per cent of a chart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from rq_compile.planning.schema import Plan
from rq_compile.planning.sweep import Sweep, SweepPoint, point_of

# Smaller values are drawn as this one, because a logarithmic axis has no place for 0.
LEAST = 1e-9


@dataclass(frozen=True)
class Mark:
    """A point at ``x`` from the left and ``y`` from the top. ``here``: whether it is the plan of the page's engine."""

    x: float
    y: float
    tip: str
    here: bool


@dataclass(frozen=True)
class Curve:
    """``line``: the points of an SVG polyline, in coordinates of 100 by 100. Ticks are (position, label)."""

    title: str
    subtitle: str
    marks: list[Mark]
    line: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def curves(sweep: Sweep, plan: Plan) -> list[Curve]:
    """Curves of the error, of LIS and of the known times. ``plan`` is marked, unless the sweep is one of engines and the plan has
    no budget for the whole engine."""
    here = point_of(plan) if sweep.of_engines else point_of(plan).of_experts
    comparable = plan.engine_bytes is not None or not sweep.of_engines
    points = sorted([*sweep.points, *([here] if comparable else [])], key=lambda point: point.bytes_taken)
    told = "predicted change of the model, in nats" if sweep.of_engines else "relative error of a layer's output, mean"
    drawn = [
        curve("Error", told, points, here, lambda point: max(point.error_within, LEAST), "{:.0e}", log=True),
        curve("LIS", "mean of the layers", points, here, lambda point: point.lis, "{:.2f}"),
    ]
    if all(point.step_time and point.token_time for point in points):
        told = "predicted, relative to the model without a plan"
        drawn += [
            curve("Time of a step", told, points, here, lambda point: point.step_time or 0, "{:.2f}"),
            curve("Time of a token", told, points, here, lambda point: point.token_time or 0, "{:.2f}"),
        ]
    return drawn


def curve(
    title: str,
    subtitle: str,
    points: Sequence[SweepPoint],
    here: SweepPoint,
    value: Callable[[SweepPoint], float],
    label: str,
    *,
    log: bool = False,
) -> Curve:
    scaled = log10 if log else float
    values = [scaled(value(point)) for point in points]
    y_values = _decades(min(values), max(values)) if log else _evenly(min(values), max(values))
    sizes = [point.bytes_taken for point in points]

    def across(size: float) -> float:
        return 100 * (size - sizes[0]) / ((sizes[-1] - sizes[0]) or 1)

    def down(scaled_value: float) -> float:
        return 100 - 100 * ((scaled_value - y_values[0]) / (y_values[-1] - y_values[0]))

    places = [(across(point.bytes_taken), down(value)) for point, value in zip(points, values, strict=True)]
    return Curve(
        title=title,
        subtitle=subtitle,
        marks=[
            Mark(x, y, f"{_budget(point)}, {point.bytes_taken / 1e6:.2f} MB: {title} {value(point):.4g}", point is here)
            for point, (x, y) in zip(points, places, strict=True)
        ],
        line=" ".join(f"{x:.2f},{y:.2f}" for x, y in places),
        x_ticks=[(across(sizes[at]), points[at].budget_told) for at in sorted({0, len(points) // 2, len(points) - 1})],
        y_ticks=[(down(tick), label.format(10**tick if log else tick)) for tick in y_values],
    )


def _budget(point: SweepPoint) -> str:
    return f"{'memory' if point.engine_bytes is None else 'engine of'} {point.budget_told}"


def _decades(least: float, most: float) -> list[float]:
    """At most five powers of ten, from below ``least`` to above ``most``."""
    low, high = floor(least), max(ceil(most), floor(least) + 1)
    step = ceil((high - low) / 4)
    return [float(low + step * at) for at in range(ceil((high - low) / step) + 1)]


def _evenly(least: float, most: float) -> list[float]:
    room = (most - least) or max(abs(most), 1.0) / 10
    if most > least:
        return [*(least + room * at / 3 for at in range(3)), most]
    return [least - room / 2, least, least + room / 2]
