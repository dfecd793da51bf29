"""Policy ``eplb``: DeepSeek's expert-parallel load balancer (github.com/deepseek-ai/EPLB), the field's baseline.

Greedy hierarchical replication and packing in full precision: groups of experts are packed onto nodes, experts are replicated
within a node, and the physical experts of a node are packed onto its ranks. EPLB uses one load per expert (the pooled counts),
and knows neither formats nor a budget. Here, the budget applies to every policy, so EPLB gets as many slots as ``memory`` allows,
rounded down to a multiple of the ranks. At memory 1.0, it can only place. On one device whose kernels are ragged, copies take no
bytes, so ``slots`` may exceed that number.

It differs from DeepSeek's code only if that would put two copies of one expert on one of several ranks. An expert gets at most as
many copies as its node has ranks, and a node whose packing has such a pair is packed again with this restriction.
"""

import numpy as np
from pydantic import Field

from rq_compile.bounds import MOST_EXPERTS, MOST_RANKS
from rq_compile.errors import UserError
from rq_compile.files import Document
from rq_compile.planning.budget import allowed, enough_for
from rq_compile.planning.placement import pack
from rq_compile.planning.policies.none import unplanned
from rq_compile.planning.problem import Decision, Layer, Problem
from rq_compile.planning.schema import Slot


class Options(Document):
    """``slots``: slots per layer; 0 means as many as the memory allows."""

    slots: int = Field(default=0, ge=0, le=MOST_EXPERTS * MOST_RANKS)
    groups: int = Field(default=1, ge=1, le=MOST_EXPERTS)
    nodes: int = Field(default=1, ge=1, le=MOST_RANKS)


def decide(problem: Problem, options: Options) -> Decision:
    slots, remarks = [], []
    for layer in problem.layers:
        count = options.slots or _affordable(layer, problem, options)
        if count < layer.experts:
            # The ranks do not divide the experts, and there is no memory for copies to fill them up.
            slots.append(unplanned(layer.experts, problem))
            continue
        _check(layer, count, problem, options)
        held = rebalance(np.asarray(layer.calibration.load, np.float64), count, options.groups, options.nodes, problem.ranks)
        per_rank = count // problem.ranks
        slots.append([Slot(expert=int(e), format=problem.dtype, rank=place // per_rank) for place, e in enumerate(held)])
    replicas = sum(len(held) - layer.experts for held, layer in zip(slots, problem.layers, strict=True))
    if not replicas:
        remarks.append(_no_room(problem))
    return Decision(slots, remarks=remarks)


def _no_room(problem: Problem) -> str:
    """The memory for the next number of slots that fills all ranks equally."""
    if problem.cost.busiest == "nothing":
        return (
            f"On {problem.cost.target} with one rank, copies share their weights: they take no bytes and save no time. EPLB "
            "makes as many as --option slots says."
        )
    more = [(layer.experts // problem.ranks + 1) * problem.ranks for layer in problem.layers]
    enough = max(
        enough_for(count * int(layer.size[0]), layer.bytes_before) for count, layer in zip(more, problem.layers, strict=True)
    )
    ranks = f" on {problem.ranks} ranks" if problem.ranks > 1 else ""
    return (
        f"EPLB keeps full precision, and --memory {problem.memory:g} has no room for a replica: the next {max(more)} slots of a "
        f"layer{ranks} take --memory {enough:g}."
    )


def _affordable(layer: Layer, problem: Problem, options: Options) -> int:
    """As many slots as the memory allows, equally many per rank, with at most one copy of an expert per rank of its node."""
    slots = allowed(problem.memory, layer.bytes_before) // int(layer.size[0])
    if problem.ranks > 1:
        slots = min(slots, layer.experts * problem.ranks // options.nodes)
    return slots // problem.ranks * problem.ranks


def _check(layer: Layer, slots: int, problem: Problem, options: Options) -> None:
    """
    Raises:
        UserError: the hierarchy does not divide evenly.
    """
    for name, value, of, by in (
        ("slots", slots, "ranks", problem.ranks),
        ("experts", layer.experts, "groups", options.groups),
        ("ranks", problem.ranks, "nodes", options.nodes),
    ):
        if value % by:
            raise UserError(
                f"policy eplb cannot divide {value} {name} of layer {layer.calibration.index} by {by} {of}; "
                "choose a number that divides",
                2,
            )
    if problem.ranks > 1 and slots > layer.experts * problem.ranks // options.nodes:
        raise UserError(
            f"with {slots} slots, copies of one of {layer.experts} experts would share a rank; give a smaller --option slots", 2
        )


def rebalance(load: np.ndarray, slots: int, groups: int, nodes: int, ranks: int) -> np.ndarray:
    """The logical expert of every slot, int64 ``[slots]``; rank r holds the r-th run of ``slots / ranks`` slots.

    ``load`` is float ``[m]``. A group of experts stays on one of ``nodes`` if these divide ``groups``; otherwise, there is no
    hierarchy. For

        load = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], 16 slots, 4 groups, 2 nodes, 8 ranks

    the result is ``[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]``.
    """
    if groups % nodes:
        groups, nodes = 1, 1
    group_size = len(load) // groups
    node_of_group = _balanced(load.reshape(groups, group_size).sum(axis=1), nodes)
    held: list[int] = []
    for node in range(nodes):
        experts = np.concatenate([group * group_size + np.arange(group_size) for group in node_of_group[node]])
        replicated = _replicated(load[experts], slots // nodes, ranks // nodes if ranks > 1 else slots)
        load_of_copy = (load[experts] / np.bincount(replicated))[replicated]
        packs = _balanced(load_of_copy, ranks // nodes)
        if ranks > 1 and any(len(set(replicated[copies])) < len(copies) for copies in packs):
            holds = pack(load[None, experts], np.bincount(replicated), ranks // nodes)
            packs = [[int(np.flatnonzero(replicated == expert)[0]) for expert in np.flatnonzero(held)] for held in holds]
        held += [int(experts[replicated[copy]]) for pack in packs for copy in pack]
    return np.array(held, np.int64)


def _balanced(weight: np.ndarray, packs: int) -> list[list[int]]:
    """Put each item, heaviest first, into the lightest pack that has room. All packs hold the same number of items."""
    room = len(weight) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    members: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in np.argsort(-weight, kind="stable"):
        pack = min((p for p in range(packs) if len(members[p]) < room), key=lambda p: total[p])
        members[pack].append(int(item))
        total[pack] += float(weight[item])
    return members


def _replicated(load: np.ndarray, slots: int, most_copies: int) -> np.ndarray:
    """The expert of each of ``slots`` copies, int64: all experts once, then repeatedly the one whose copies are busiest."""
    held = list(range(len(load)))
    copies = np.ones(len(load))
    for _ in range(slots - len(load)):
        busiest = int(np.where(copies < most_copies, load / copies, -1.0).argmax())
        held.append(busiest)
        copies[busiest] += 1
    return np.array(held, np.int64)
