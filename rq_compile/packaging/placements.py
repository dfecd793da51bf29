"""A plan's experts on ranks in the form that serving systems need: the same number of slots on every rank, in every layer.

Their files only state which logical expert a slot holds. Copies that share a rank therefore count once, empty places get copies
that relieve the busiest slots, and formats are lost. Every loss becomes a remark.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rq_compile.errors import UserError
from rq_compile.files import read_document
from rq_compile.planning.placement import contiguous, imbalance, rank_loads
from rq_compile.planning.schema import LayerPlan, Plan
from rq_compile.quantization.formats import FLOAT_FORMATS
from rq_compile.runtime.files import read_manifest


@dataclass(frozen=True)
class Placement:
    """``experts [layers, ranks, slots of a rank]`` int64: the logical expert of every slot, ascending within a rank.

    ``index [layers]``: the numbers of the decoder layers, including dense ones. ``experts_of_model``: m.
    """

    model: str
    index: list[int]
    experts: np.ndarray
    experts_of_model: int
    remarks: list[str]

    @property
    def ranks(self) -> int:
        return self.experts.shape[1]

    @property
    def slots(self) -> int:
        """Number of slots of a layer, on all ranks."""
        return self.experts.shape[1] * self.experts.shape[2]

    @property
    def redundant(self) -> int:
        """Number of slots of a layer in excess of one per logical expert."""
        return self.slots - self.experts_of_model

    def by_layer(self) -> list[list[int]]:
        """For each MoE layer, the logical expert of each slot. Consecutive blocks of slots belong to a rank."""
        return self.experts.reshape(len(self.index), -1).tolist()


def read_placement(path: Path, extra_layers: int = 0, first: int | None = None) -> Placement:
    """The placement of a ``plan.json``, or of the plan of an engine (``.onnx``), followed by ``extra_layers``
    multi-token-prediction layers. ``first`` is the number of the first of them, by default the next one.

    Raises:
        UserError: the file cannot be read, or ``placement_of`` refuses its plan.
    """
    plan = read_plan(path)
    placement = placement_of(plan, str(path))
    if extra_layers:
        return _with_extra_layers(placement, extra_layers, placement.index[-1] + 1 if first is None else first)
    if plan.extra_layers:
        told = (
            f"the plan does not place the model's {plan.extra_layers} multi-token-prediction layers (num_nextn_predict_layers): "
            f"if the server runs them, give --extra-layers {plan.extra_layers} to add their rows"
        )
        return replace(placement, remarks=[*placement.remarks, told])
    return placement


def read_plan(path: Path) -> Plan:
    """A ``plan.json``, or the plan of an engine (``.onnx``).

    Raises:
        UserError: the file cannot be read.
    """
    return read_manifest(path).plan if path.suffix == ".onnx" or path.is_dir() else read_document(Plan, path)


def _with_extra_layers(placement: Placement, count: int, first: int) -> Placement:
    """Their loads are unknown, so experts are in consecutive blocks, and empty places get copies in turn."""
    experts, places = placement.experts_of_model, placement.experts.shape[2]
    holds = contiguous(experts, placement.ranks) == np.arange(placement.ranks)[:, None]
    row = np.nonzero(_filled(np.full(experts, 1 / experts), holds, places))[1].reshape(placement.ranks, places)
    told = (
        f"the rows of {count} multi-token-prediction layers from {first} on are not planned: their loads are not known, so "
        "experts are in consecutive blocks"
    )
    return replace(
        placement,
        index=[*placement.index, *range(first, first + count)],
        experts=np.concatenate([placement.experts, np.stack([row] * count)]),
        remarks=[*placement.remarks, told],
    )


def placement_of(plan: Plan, name: str = "the plan") -> Placement:
    """
    Raises:
        UserError: the plan has one rank, or its layers have different numbers of experts.
    """
    if plan.ranks < 2:
        raise UserError(f"{name} is for one rank, so there is nothing to place; plan with --ranks 2 or more", 2)
    experts = one_number_of_experts(plan, name)
    layers = sorted(plan.layers, key=lambda layer: layer.index)
    planned = [_holds(layer, plan.ranks) for layer in layers]
    loads = [loads_of(layer) for layer in layers]
    places = max(int(holds.sum(axis=1).max()) for holds in planned)
    filled = [_filled(load, holds, places) for load, holds in zip(loads, planned, strict=True)]
    return Placement(
        model=plan.model,
        index=[layer.index for layer in layers],
        experts=np.stack([np.nonzero(holds)[1].reshape(plan.ranks, places) for holds in filled]),
        experts_of_model=experts,
        remarks=[_balance(loads, planned, filled), *_losses(layers, planned, filled)],
    )


def one_number_of_experts(plan: Plan, name: str) -> int:
    """
    Raises:
        UserError: layers have different numbers of experts.
    """
    sizes = {layer.geometry.experts for layer in plan.layers}
    if len(sizes) > 1:
        raise UserError(
            f"layers of {name} have {min(sizes)} to {max(sizes)} experts, but a placement file holds one "
            "number for all; give a model whose layers have the same number",
            2,
        )
    return sizes.pop()


def _holds(layer: LayerPlan, ranks: int) -> np.ndarray:
    """bool ``[R, m]``, as ``planning.placement`` has it."""
    holds = np.zeros((ranks, layer.geometry.experts), bool)
    for slot in layer.slots:
        holds[slot.rank, slot.expert] = True
    return holds


def loads_of(layer: LayerPlan) -> np.ndarray:
    """Expected share of every logical expert ``[m]``. If the plan does not know them, all are equal, and ``_losses`` says so."""
    if not _knows_loads(layer):
        return np.full(layer.geometry.experts, 1 / layer.geometry.experts)
    return np.bincount([slot.expert for slot in layer.slots], [slot.load or 0.0 for slot in layer.slots], layer.geometry.experts)


def _knows_loads(layer: LayerPlan) -> bool:
    """Whether the loads of all slots are known and not all zero."""
    return all(slot.load is not None for slot in layer.slots) and any(slot.load for slot in layer.slots)


def _filled(load: np.ndarray, planned: np.ndarray, places: int) -> np.ndarray:
    """Fill every rank to ``places`` experts. While some rank has room: of the experts that such ranks lack, the one with the
    busiest slots gets a copy, on the least busy of these ranks."""
    holds = planned.copy()
    while (vacant := holds.sum(axis=1) < places).any():
        lacking = ~holds & vacant[:, None]
        expert = int(np.where(lacking.any(axis=0), load / holds.sum(axis=0), -1.0).argmax())
        busy = rank_loads(load[None], holds)[0]
        holds[int(np.where(lacking[:, expert], busy, np.inf).argmin()), expert] = True
    return holds


def _balance(loads: list[np.ndarray], planned: list[np.ndarray], filled: list[np.ndarray]) -> str:
    def mean(held: list[np.ndarray]) -> float:
        return float(np.mean([imbalance(load[None], holds) for load, holds in zip(loads, held, strict=True)]))

    ranks, experts = filled[0].shape
    blocks = [contiguous(experts, ranks) == np.arange(ranks)[:, None]] * len(loads)
    return (
        f"busiest rank over the mean rank on the calibration text, mean over layers: {mean(blocks):.3f} with experts in "
        f"consecutive blocks, {mean(planned):.3f} as planned, {mean(filled):.3f} as written"
    )


def _losses(layers: list[LayerPlan], planned: list[np.ndarray], filled: list[np.ndarray]) -> list[str]:
    remarks = []
    if unknown := [layer.index for layer in layers if not _knows_loads(layer)]:
        named = ", ".join(map(str, unknown))
        remarks.append(f"the plan has no loads for layers {named}: balance and added copies assume equally loaded experts")
    lost = Counter(slot.format for layer in layers for slot in layer.slots if slot.format not in FLOAT_FORMATS)
    if lost:
        mix = ", ".join(f"{count} in {format}" for format, count in sorted(lost.items()))
        remarks.append(f"placement files have no formats: slots planned as {mix} are served in the checkpoint's format")
    slots = sum(int(holds.sum()) for holds in filled)
    experts = sum(layer.geometry.experts for layer in layers)
    if slots > experts:
        remarks.append(
            f"in that format {slots} slots for {experts} experts take {slots / experts:.2f} times the experts' memory; "
            "policy eplb plans for this memory, policy place plans without copies"
        )
    together = sum(len(layer.slots) for layer in layers) - sum(int(holds.sum()) for holds in planned)
    if together:
        remarks.append(f"copies of an expert that shared a rank are now one slot: {together} fewer slots over all layers")
    added = [int(after.sum() - before.sum()) for before, after in zip(planned, filled, strict=True)]
    if any(added):
        remarks.append(
            f"copies were added so that every rank has {int(filled[0][0].sum())} slots in every layer: "
            f"{sum(added)} in {sum(map(bool, added))} layers, at most {max(added)} in one layer"
        )
    return remarks
