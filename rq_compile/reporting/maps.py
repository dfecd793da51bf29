"""Maps of the load before and after planning, and of the format of every slot."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from rq_compile.planning.schema import LayerPlan, Plan, Slot
from rq_compile.quantization.formats import FORMATS, SLOT_FORMATS, Format
from rq_compile.reporting.grid import Cell, Grid, grid

# The bounds between tones, as load relative to the mean load of the layer's experts. The first tone means no load at all.
BOUNDS = (0.0, 0.25, 0.5, 0.8, 1.25, 2.0, 3.0, 5.0)
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Maps:
    """``before``: one cell per expert. ``after``, ``formats``: the slots of each expert, side by side in its place. ``unknown``:
    layers in which the load of some slot is not known."""

    before: Grid
    after: Grid
    formats: Grid
    unknown: list[int]


def maps(plan: Plan) -> Maps:
    columns = max(layer.geometry.experts for layer in plan.layers)
    names = [str(layer.index) for layer in plan.layers]
    before, after, formats = (
        grid((cell for row, layer in enumerate(plan.layers) for cell in cells(row, layer)), names, columns)
        for cells in (experts, slots, stored)
    )
    return Maps(before, after, formats, unknown=[layer.index for layer in plan.layers if loads(layer) is None])


def tone(load: float) -> str:
    """The tone of a load: ``t0`` without load, ``t4`` at the mean, ``t8`` from five times the mean on."""
    return f"t{sum(load > bound for bound in BOUNDS)}"


def legend() -> list[tuple[str, str]]:
    """Tones and their meanings."""
    between = [(f"t{number}", f"{low:g}\N{EN DASH}{high:g}") for number, (low, high) in enumerate(pairwise(BOUNDS), start=1)]
    return [("t0", "none"), *between, (f"t{len(BOUNDS)}", f"over {BOUNDS[-1]:g}")]


def tone_of(format: Format) -> str:
    """The class of a format's colour: one for each number of bits."""
    return f"bits{SLOT_FORMATS[format].bits}"


def formats_legend(plan: Plan) -> list[tuple[str, str]]:
    held = {slot.format for layer in plan.layers for slot in layer.slots}
    return [(tone_of(format), format) for format in FORMATS if format in held]


def loads(layer: LayerPlan) -> list[float] | None:
    """The load of every slot relative to the mean of the layer's experts; None if the load of some slot is not known."""
    known = [slot.load for slot in layer.slots if slot.load is not None]
    return [load * layer.geometry.experts for load in known] if len(known) == len(layer.slots) else None


def places(layer: LayerPlan) -> dict[int, list[int]]:
    """Logical expert -> its slots."""
    held = defaultdict(list)
    for number, slot in enumerate(layer.slots):
        held[slot.expert].append(number)
    return dict(sorted(held.items()))


def experts(row: int, layer: LayerPlan) -> Iterator[Cell]:
    known = loads(layer)
    total = {expert: None if known is None else sum(known[slot] for slot in held) for expert, held in places(layer).items()}
    busiest = None if known is None else max(total, key=lambda expert: total[expert] or 0)
    for expert, load in total.items():
        told = "load not known" if load is None else f"{load:.2f} x the mean load"
        yield Cell(
            row=row,
            column=expert,
            width=1,
            tone=UNKNOWN if load is None else tone(load),
            number="" if load is None else shown(load),
            tip=f"layer {layer.index}, expert {expert}: {told}",
            notable=expert == busiest,
        )


def slots(row: int, layer: LayerPlan) -> Iterator[Cell]:
    known = loads(layer)
    computed = [number for number, slot in enumerate(layer.slots) if slot.computed]
    busiest = None if known is None else max(computed, key=known.__getitem__, default=None)
    for number, column, width in layout(layer):
        load = None if known is None else known[number]
        told = "load not known" if load is None else f"{load:.2f} x the mean load of an expert"
        told += "" if number in computed else ", which its mean output replaces"
        yield Cell(
            row=row,
            column=column,
            width=width,
            tone=UNKNOWN if load is None else tone(load),
            number="" if load is None or width < 1 else shown(load),
            tip=f"{name(layer, number)}: {told}",
            notable=number == busiest,
        )


def stored(row: int, layer: LayerPlan) -> Iterator[Cell]:
    for number, column, width in layout(layer):
        slot = layer.slots[number]
        yield Cell(
            row=row,
            column=column,
            width=width,
            tone=tone_of(slot.format),
            number="" if width < 1 / 2 else str(SLOT_FORMATS[slot.format].bits),
            tip=f"{name(layer, number)}: {slot.format}, {layer.geometry.expert_bytes(slot.format):,} bytes",
        )


def layout(layer: LayerPlan) -> Iterator[tuple[int, float, float]]:
    """Slots with their columns and widths. The slots of an expert share its place."""
    for expert, held in places(layer).items():
        for position, number in enumerate(held):
            yield number, expert + position / len(held), 1 / len(held)


def shown(load: float) -> str:
    """The text of a cell. A cell with almost no load stays empty."""
    return "" if load < 0.05 else f"{load:.1f}"


def name(layer: LayerPlan, number: int) -> str:
    return f"layer {layer.index}, expert {layer.slots[number].expert}, slot {number}"


def formats_of(slots: list[Slot]) -> dict[Format, int]:
    counts = Counter(slot.format for slot in slots)
    return {format: counts[format] for format in FORMATS if counts[format]}
