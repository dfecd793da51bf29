"""The last gap closed: what could still be better than a known allocation, as an integer program.

At the best price a choice costs some amount more than its alternatives (its reduced cost). A solution that makes it is worse than
the bound by at least that much, so only choices within the gap between the known value and the bound can be part of anything
better (reduced-cost fixing; Nemhauser and Wolsey 1988, II.5.4). Few survive, usually; then HiGHS solves the rest, exactly, and
what it finds is checked in whole bytes. Where too many survive, the gap stays and is reported.
"""

from dataclasses import dataclass, field
from math import gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rq_compile.planning.allocation import Allocation, LayerChoice, LayerChoices, slot_experts
from rq_compile.planning.metrics import copy_numbers

MOST_COLUMNS = 4000
MOST_NODES = 2000
# HiGHS stops 1e-6 short of the optimum in absolute terms: the known value is scaled to this.
SCALE = 1e4


def polished(layers: list[LayerChoices], allowed: list[list[int]], known: Allocation, budget: int) -> Allocation:
    """``known``, or what is better, with a bound that is its own value where the rest could be solved.

    ``allowed[l]``: numbers of replicas that layer l may stop after.
    """
    if known.value <= known.bound:
        return known
    columns = _surviving(layers, allowed, known)
    if len(columns.cost) > MOST_COLUMNS:
        return known
    scale = SCALE / known.value
    unit = gcd(budget, *columns.size) if any(columns.size) else 1
    rows = [*columns.equal, dict(enumerate(size // unit for size in columns.size))]
    matrix = csr_array(
        (
            [value for row in rows for value in row.values()],
            ([number for number, row in enumerate(rows) for _ in row], [column for row in rows for column in row]),
        ),
        shape=(len(rows), len(columns.cost)),
    )
    result = milp(
        scale * np.array(columns.cost),
        integrality=np.ones(len(columns.cost)),
        bounds=Bounds(0, np.array(columns.most)),
        constraints=LinearConstraint(matrix, [*columns.right, -np.inf], [*columns.right, budget // unit]),
        options={"mip_rel_gap": 0.0, "node_limit": MOST_NODES},
    )
    found = known if result.x is None else _read(layers, columns, np.rint(result.x), known, budget)
    if result.status != 0:
        return found
    # Solved: nothing within the budget is better than the result, and what was fixed is no better than ``known``.
    return Allocation(found.layers, found.value, found.value, found.price)


@dataclass
class _Columns:
    """Variables of the program. ``stops[column]``: (layer, replicas); ``formats[column]``: (layer, expert, copies, format).

    ``equal``: coefficients of the equations by column, with ``right``-hand sides.
    """

    cost: list[float] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    most: list[int] = field(default_factory=list)
    stops: dict[int, tuple[int, int]] = field(default_factory=dict)
    formats: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    equal: list[dict[int, int]] = field(default_factory=list)
    right: list[int] = field(default_factory=list)

    def add(self, cost: float, size: int, most: int) -> int:
        self.cost.append(cost)
        self.size.append(size)
        self.most.append(most)
        return len(self.cost) - 1


def _surviving(layers: list[LayerChoices], allowed: list[list[int]], known: Allocation) -> _Columns:
    # A little more than the gap, as reduced costs carry rounding.
    gap = (known.value - known.bound) + 1e-9 * abs(known.value)
    columns = _Columns()
    for place, layer in enumerate(layers):
        total = layer.priced(known.price)[allowed[place]]
        stops = {n: float(more) for n, more in zip(allowed[place], total - total.min(), strict=True) if more <= gap}
        counts = {number: layer.sequence.counts(number, layer.experts) for number in stops}
        stop = {number: columns.add(float(layer.penalty[number]), 0, 1) for number in stops}
        columns.stops |= {column: (place, number) for number, column in stop.items()}
        columns.equal.append(dict.fromkeys(stop.values(), 1))
        columns.right.append(1)
        for expert in range(layer.experts):
            for copies in sorted({int(count[expert]) for count in counts.values()}):
                having = [number for number, count in counts.items() if count[expert] == copies]
                allowance = gap - min(stops[number] for number in having)
                _add_formats(columns, layer, (place, expert, copies), known.price, allowance, [stop[n] for n in having])
        if len(columns.cost) > MOST_COLUMNS:
            break
    return columns


def _add_formats(
    columns: _Columns, layer: LayerChoices, at: tuple[int, int, int], price: float, allowance: float, stops: list[int]
) -> None:
    """The formats of one expert with a number of copies; as many are chosen as copies (or one for all) if one of ``stops`` is."""
    _, expert, copies = at
    paid = layer.error[expert] + price * copies * layer.size
    shares = copies if layer.mixed else 1
    # One copy in another format costs its share of the difference.
    surviving = np.flatnonzero((paid - paid.min()) / shares <= allowance)
    equation = dict.fromkeys(stops, -shares)
    for format in surviving:
        error, size = float(layer.error[expert, format]) / shares, int(layer.size[format]) * copies // shares
        column = columns.add(error, size, shares)
        columns.formats[column] = (*at, int(format))
        equation[column] = 1
    columns.equal.append(equation)
    columns.right.append(0)


def _read(layers: list[LayerChoices], columns: _Columns, x: np.ndarray, known: Allocation, budget: int) -> Allocation:
    """The allocation that ``x`` stands for, if it is better than ``known`` and really fits."""
    replicas = dict(columns.stops[column] for column in columns.stops if x[column] > 0)
    held: dict[tuple[int, int, int], list[int]] = {}
    for column, (place, expert, copies, format) in columns.formats.items():
        held.setdefault((place, expert, copies), []).extend([format] * int(x[column]))
    value, size, chosen = 0.0, 0, []
    for place, layer in enumerate(layers):
        count = layer.sequence.counts(replicas[place], layer.experts)
        of_expert = [held[place, expert, int(count[expert])] for expert in range(layer.experts)]
        experts = slot_experts(count)
        number, _ = copy_numbers(experts.tolist())
        slots = zip(experts, number if layer.mixed else np.zeros_like(number), strict=True)
        formats = np.array([of_expert[expert][copy] for expert, copy in slots])
        chosen.append(LayerChoice(count, formats))
        value += float(layer.penalty[replicas[place]] + (layer.error[experts, formats] / count[experts]).sum())
        size += int(layer.size[formats].sum())
    if size > budget or value >= known.value:
        return known
    return Allocation(chosen, value, known.bound, known.price)
