"""Policy ``craft``: replicas in the layers where they gain most, based on CRAFT (arXiv 2603.28768).

EPLB gives every layer the same number of replicas, although in many layers the later ones gain little. CRAFT estimates the gain
of more replicas for each layer, and spends a memory budget on the largest gains. Experts keep the checkpoint's format, so
replicas need a ``memory`` above 1.

These points are not specified by the abstract and are our choice. A layer's copies and ranks are those of EPLB
(``eplb.rebalance``). A gain is the decrease of the imbalance of the worst text (of ranks, or of slots on one rank). The budget is
spent step by step on the largest gain per byte, looking ahead over as many further replicas as necessary (the concave hull of a
layer's curve).
"""

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from rq_compile.bounds import MOST_EXPERTS, MOST_RANKS
from rq_compile.files import Document
from rq_compile.planning.placement import imbalance
from rq_compile.planning.policies.eplb import rebalance
from rq_compile.planning.policies.none import unplanned
from rq_compile.planning.problem import Decision, Layer, Problem
from rq_compile.planning.schema import Slot


class Options(Document):
    """``most``: maximum number of replicas of a layer; 0 means the number of its experts."""

    most: int = Field(default=0, ge=0, le=MOST_EXPERTS * MOST_RANKS)


@dataclass(frozen=True)
class Candidate:
    """A layer with some number of replicas. ``held``: the expert of every slot; None for the unplanned layer."""

    held: np.ndarray | None
    replicas: int
    imbalance: float


def decide(problem: Problem, options: Options) -> Decision:
    curves = [_curve(layer, problem.ranks, options.most or layer.experts) for layer in problem.layers]
    size = [int(layer.size[0]) for layer in problem.layers]
    chosen = [0] * len(curves)
    room = problem.budget - sum(layer.experts * bytes for layer, bytes in zip(problem.layers, size, strict=True))
    while True:
        steps = [
            (
                (curve[at].imbalance - candidate.imbalance) / ((candidate.replicas - curve[at].replicas) * bytes),
                -position,
                -further,
            )
            for position, (curve, at, bytes) in enumerate(zip(curves, chosen, size, strict=True))
            for further, candidate in enumerate(curve[at + 1 :], at + 1)
            if (candidate.replicas - curve[at].replicas) * bytes <= room and candidate.imbalance < curve[at].imbalance
        ]
        if not steps:
            break
        _, position, further = max(steps)
        position, further = -position, -further
        room -= (curves[position][further].replicas - curves[position][chosen[position]].replicas) * size[position]
        chosen[position] = further
    found = [curve[at] for curve, at in zip(curves, chosen, strict=True)]
    slots = [_slots(layer, candidate, problem) for layer, candidate in zip(problem.layers, found, strict=True)]
    counts = [candidate.replicas for candidate in found]
    if not any(counts):
        return Decision(
            slots, remarks=[f"CRAFT keeps full precision, and --memory {problem.memory:g} allows no replica that helps."]
        )
    return Decision(slots, remarks=[f"CRAFT gives layers {min(counts)} to {max(counts)} replicas, {sum(counts)} in all."])


def _curve(layer: Layer, ranks: int, most: int) -> list[Candidate]:
    """A layer without replicas and with increasing numbers of them, equally many on every rank."""
    most = min(most, layer.experts * (ranks - 1)) if ranks > 1 else most
    load = np.asarray(layer.calibration.load, np.float64)
    curve = [Candidate(None, 0, _imbalance(layer, None, ranks))]
    for slots in range(-(-layer.experts // ranks) * ranks, layer.experts + most + 1, ranks):
        held = rebalance(load, slots, 1, 1, ranks)
        curve.append(Candidate(held, slots - layer.experts, _imbalance(layer, held, ranks)))
    # A placement without replicas costs nothing.
    free = min((candidate for candidate in curve if not candidate.replicas), key=lambda candidate: candidate.imbalance)
    return [free, *(candidate for candidate in curve if candidate.replicas)]


def _imbalance(layer: Layer, held: np.ndarray | None, ranks: int) -> float:
    """Imbalance of the ranks (of the slots, if there is one rank) in the text that is served worst."""
    if held is None:
        held = np.arange(layer.experts)
        rank_of = held * ranks // layer.experts
    else:
        rank_of = np.arange(len(held)) * ranks // len(held)
    if ranks == 1:
        share = layer.demand / np.bincount(held, minlength=layer.experts)
        return max(1.0, float((share.max(axis=1) / layer.demand.mean(axis=1)).max()))
    holds = np.zeros((ranks, layer.experts), bool)
    holds[rank_of, held] = True
    return imbalance(layer.demand, holds)


def _slots(layer: Layer, candidate: Candidate, problem: Problem) -> list[Slot]:
    if candidate.held is None:
        return unplanned(layer.experts, problem)
    per_rank = len(candidate.held) // problem.ranks
    return [Slot(expert=int(e), format=problem.dtype, rank=place // per_rank) for place, e in enumerate(candidate.held)]
