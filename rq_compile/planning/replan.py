"""New loads for a plan that is in use: the fewest changes that restore balance, and the bytes that they move.

Every slot keeps its place and its rank. A change gives a slot another expert (in the format that the plan gave this expert) or,
if the memory allows it, adds a slot. On one rank, the number of changes is the least possible: an expert needs
``ceil(load / goal)`` copies, and each missing copy is one change, which replaces a copy that is no longer needed. On
several ranks, the change that relieves the busiest rank most per byte comes first (a slot gets another expert, or two ranks
exchange a slot), until the goal is reached or no change helps.
"""

from typing import Literal

import numpy as np
from pydantic import ValidationError

from rq_compile.calibration.schema import Calibration
from rq_compile.errors import UserError
from rq_compile.files import Document
from rq_compile.planning.budget import over_budget
from rq_compile.planning.costs import CostModel
from rq_compile.planning.few_bits import measuring
from rq_compile.planning.metrics import copy_numbers
from rq_compile.planning.placement import MOST_MOVES, Move, best_exchange, best_replacement, imbalance
from rq_compile.planning.plan import CommonOptions, layer_plan
from rq_compile.planning.problem import Layer, Problem, problem_of
from rq_compile.planning.remarks import remarks
from rq_compile.planning.schema import LayerPlan, Plan, Slot
from rq_compile.planning.solver import ROUNDING
from rq_compile.quantization.formats import BLOCK_FORMATS
from rq_compile.violations import violation


class Change(Document):
    """Slot ``slot`` of a layer holds expert ``now`` instead of ``before`` (None: the slot is new)."""

    slot: int
    rank: int
    before: int | None
    now: int
    bytes: int


class LayerChanges(Document):
    """``imbalance``: busiest slot or rank divided by the mean, in the text that is served worst, with the new loads."""

    index: int
    imbalance_before: float
    imbalance_after: float
    changes: list[Change]


class Changes(Document):
    """The changes that adapt a plan to new loads. ``slots``: number of slots of the old plan."""

    kind: Literal["changes"] = "changes"
    tolerance: float
    slots: int
    layers: list[LayerChanges]

    @property
    def count(self) -> int:
        return sum(len(layer.changes) for layer in self.layers)

    @property
    def bytes_moved(self) -> int:
        return sum(change.bytes for layer in self.layers for change in layer.changes)


def replan(
    plan: Plan, calibration: Calibration, *, tolerance: float = 0.05, calibration_sha256: str | None = None
) -> tuple[Plan, Changes]:
    """``plan`` for the loads of ``calibration``, balanced to within ``tolerance`` of the mean as far as its memory allows.

    Raises:
        UserError: the calibration is of another model or quantization than the plan, the plan does not fit its own budget, or
            the tolerance is negative.
    """
    if tolerance < 0:
        raise UserError(f"a tolerance of {tolerance:g} cannot be met; give 0 or more", 2)
    _check_same_model(plan, calibration)
    _check_same_quantization(plan, calibration)
    _check_balanced(plan)
    common = _common_options(plan)
    problem = problem_of(
        calibration,
        target=plan.target,
        ranks=plan.ranks,
        memory=plan.memory,
        smoothing=common.smoothing,
        worst_text=common.worst_text,
        tokens=common.tokens,
    )
    taken = sum(problem.cost.bytes_taken(layer.geometry, layer.slots) for layer in plan.layers)
    room = problem.budget - taken
    if room < 0:
        raise over_budget(taken, plan.memory, problem.bytes_before, "the plan", action="plan again with")
    layers, changed = [], []
    for layer, old in zip(problem.layers, plan.layers, strict=True):
        slots = _replanned(problem, layer, old, 1 + tolerance, room)
        layers.append(layer_plan(problem, layer, slots, calibration.batch_size, problem.tokens))
        changed.append(_changes(problem, layer, old, slots))
        room -= problem.cost.bytes_taken(old.geometry, slots) - problem.cost.bytes_taken(old.geometry, old.slots)
    changes = Changes(tolerance=tolerance, slots=sum(len(layer.slots) for layer in plan.layers), layers=changed)
    return _updated(plan, layers, changes, [*_summary(problem, changes), *remarks(problem, layers)], calibration_sha256), changes


def _check_balanced(plan: Plan) -> None:
    """
    Raises:
        UserError: slots would be copied or moved in a layer with constant experts.
    """
    constant = sum(len(layer.constant_experts) for layer in plan.layers)
    if constant and CostModel(plan.target, plan.ranks).busiest != "nothing":
        raise UserError(
            f"the plan replaces {constant} experts by their mean outputs, and replan cannot balance such plans; make a new plan "
            "from the loads",
            2,
        )


def _common_options(plan: Plan) -> CommonOptions:
    """
    Raises:
        UserError: one of them is out of range.
    """
    try:
        return CommonOptions(**{name: plan.options[name] for name in CommonOptions.model_fields if name in plan.options})
    except ValidationError as error:
        raise UserError(f"the options of the plan are not valid: {violation(error)}; plan again", 2) from error


def _check_same_model(plan: Plan, calibration: Calibration) -> None:
    known, given = ([layer.name for layer in document.layers] for document in (plan, calibration))
    if plan.fingerprint != calibration.fingerprint or known != given:
        raise UserError(
            f"the loads are of {calibration.model} ({calibration.fingerprint[:12]}), but the plan is for {plan.model} "
            f"({plan.fingerprint[:12]}); calibrate the plan's model",
            2,
        )


def _check_same_quantization(plan: Plan, calibration: Calibration) -> None:
    """Check that slots have the bytes and errors that the plan assumes.

    Raises:
        UserError: they differ. The message names the layer and the difference.
    """
    for layer, old in zip(calibration.layers, plan.layers, strict=True):
        different = [(name, value) for name, value in layer.geometry if getattr(old.geometry, name) != value]
        if different:
            name, value = different[0]
            way_out = f"calibrate with --block {old.geometry.block}" if name == "block" else "calibrate the plan's model"
            raise UserError(
                f"layer {old.index} of the loads has {name} {value}, but the plan has {getattr(old.geometry, name)}; {way_out}, "
                "or make a new plan from the loads",
                2,
            )
        known = {calibration.dtype, *layer.error}
        if missing := sorted({slot.format for slot in old.slots} - known):
            again = f"calibrate with {measuring(slot.format for slot in old.slots)}, or " if missing[0] in BLOCK_FORMATS else ""
            raise UserError(
                f"layer {old.index} of the plan has slots in {missing[0]}, but the loads were measured in "
                f"{', '.join(sorted(known))}; {again}make a new plan from the loads",
                2,
            )
    if calibration.quantizer != plan.quantizer:
        raise UserError(
            f"the loads were measured with --quantizer {calibration.quantizer}, but the plan is for {plan.quantizer}; calibrate "
            f"with --quantizer {plan.quantizer}, or make a new plan from the loads",
            2,
        )


def _updated(plan: Plan, layers: list[LayerPlan], changes: Changes, said: list[str], calibration_sha256: str | None) -> Plan:
    fields = plan.model_dump(exclude={"layers", "remarks", "optimality", "options", "calibration_sha256"})
    if changes.count:
        fields["predicted_engine_bytes"] = None
    options = {**plan.options, "replanned_to": changes.tolerance}
    return Plan(**fields, layers=layers, remarks=said, options=options, calibration_sha256=calibration_sha256)


def _summary(problem: Problem, changes: Changes) -> list[str]:
    moved = f"{changes.count} of {changes.slots} slots change and {changes.bytes_moved / 1e6:.2f} MB move"
    if problem.cost.busiest == "nothing":
        return [f"Replanned for new loads: {problem.cost.target} does not wait for busy experts, so nothing changes."]
    missed = sum(layer.imbalance_after > 1 + changes.tolerance + ROUNDING for layer in changes.layers)
    if not missed:
        return [f"Replanned for new loads: {moved}, and every layer is within {100 * changes.tolerance:g} % of balance."]
    return [
        f"Replanned for new loads: {moved}, but {missed} of {len(changes.layers)} layers stay more than "
        f"{100 * changes.tolerance:g} % out of balance; make a new plan."
    ]


def _replanned(problem: Problem, layer: Layer, old: LayerPlan, goal: float, room: int) -> list[Slot]:
    if problem.cost.busiest == "nothing":
        return old.slots
    if problem.cost.busiest == "rank":
        return _on_ranks(problem, layer, old, goal, room)
    return _on_one_rank(layer, old, goal, room)


def _formats(layer: Layer, slots: list[Slot]) -> tuple[list[Slot], np.ndarray]:
    """A slot to copy for every expert (its last), and the bytes of each, int64 ``[m]``."""
    model = {slot.expert: slot for slot in slots}
    pattern = [model[expert] for expert in range(layer.experts)]
    return pattern, np.array([layer.geometry.expert_bytes(slot.format) for slot in pattern], np.int64)


def _on_one_rank(layer: Layer, old: LayerPlan, goal: float, room: int) -> list[Slot]:
    slots = list(old.slots)
    pattern, size = _formats(layer, slots)
    load = layer.worst_demand()
    copies = np.bincount([slot.expert for slot in slots], minlength=layer.experts)
    while (load / copies).max() > goal + ROUNDING:
        busiest = int((load / copies).argmax())
        # Give up the slot whose expert then has the least busy slots, well below the busiest slot.
        left = np.where(copies > 1, load / np.maximum(1, copies - 1), np.inf)
        left[(size[busiest] - size > room) | (np.arange(layer.experts) == busiest)] = np.inf
        spare = int(left.argmin())
        if left[spare] <= goal + ROUNDING or (left[spare] < load[busiest] / copies[busiest] and size[busiest] > room):
            place = max(s for s, slot in enumerate(slots) if slot.expert == spare)
            slots[place] = pattern[busiest].model_copy(update={"rank": slots[place].rank})
            copies[spare] -= 1
            room -= int(size[busiest] - size[spare])
        elif size[busiest] <= room:
            slots.append(pattern[busiest])
            room -= int(size[busiest])
        else:
            break
        copies[busiest] += 1
    return slots


def _on_ranks(problem: Problem, layer: Layer, old: LayerPlan, goal: float, room: int) -> list[Slot]:
    slots = list(old.slots)
    pattern, size = _formats(layer, slots)
    holds = np.zeros((problem.ranks, layer.experts), bool)
    for slot in slots:
        holds[slot.rank, slot.expert] = True
    for _ in range(MOST_MOVES):
        now = imbalance(layer.demand, holds)
        if now <= goal:
            break
        moves = [best_replacement(layer.demand, holds, size, room), best_exchange(layer.demand, holds)]
        busiest = now * layer.experts / problem.ranks
        best = max((move for move in moves if move), key=lambda move: (busiest - move.after) / _moved(move, size), default=None)
        if best is None:
            break
        for rank, expert, new in best.slots:
            place = next(s for s, slot in enumerate(slots) if slot.rank == rank and slot.expert == expert)
            slots[place] = pattern[new].model_copy(update={"rank": rank})
            room -= int(size[new] - size[expert])
        best.make(holds)
    return slots


def _moved(move: Move, size: np.ndarray) -> int:
    return int(sum(size[new] for _, _, new in move.slots))


def _changes(problem: Problem, layer: Layer, old: LayerPlan, slots: list[Slot]) -> LayerChanges:
    found = []
    for place, slot in enumerate(slots):
        before = old.slots[place].expert if place < len(old.slots) else None
        if slot.expert != before:
            size = layer.geometry.expert_bytes(slot.format)
            found.append(Change(slot=place, rank=slot.rank, before=before, now=slot.expert, bytes=size))
    return LayerChanges(
        index=old.index,
        imbalance_before=_imbalance(problem, layer, old.slots),
        imbalance_after=_imbalance(problem, layer, slots),
        changes=found,
    )


def _imbalance(problem: Problem, layer: Layer, slots: list[Slot]) -> float:
    experts = [slot.expert for slot in slots]
    _, copies = copy_numbers(experts)
    share = layer.demand[:, experts] / copies
    if problem.ranks == 1:
        return max(1.0, float(share.max()))
    on_rank = np.array([slot.rank for slot in slots])[:, None] == np.arange(problem.ranks)
    load = share @ on_rank.astype(np.float64)
    return float((load.max(axis=1) / load.mean(axis=1)).max())
