"""What a balanced plan saves where ranks run side by side: the time of MoE layers on 2 ranks, processes of one thread each.

A case (rank_cases.py) is a stack of MoE layers without anything between them, so that the time is that of the MoE part with its
exchange. Weights are random. They are not in the processor's caches before a step, as if the model were larger than the caches.
All policies of a case take turns in the same processes; ``ms`` is the median over steps of the slowest rank's time, and
``time_ratio`` the median ratio to ``none`` in the same round.

``predicted`` is the plan's predicted time over that of ``none``, with the exchange; ``imbalance`` is the same ratio of the
plan's rank imbalance, and ``counted`` that of the rows of the busiest rank in the timed steps. ``experts_read`` is the largest
number of experts that a rank had rows for, as a mean over layers and steps. ``interrupted`` is the share of a rank's time in
which its core ran something else.

    python benchmarks/ranks.py prepare /tmp/ranks            # minutes: calibrates, plans, writes the stacks
    python benchmarks/ranks.py time /tmp/ranks --cases "OLMoE, Gini 0.44" -o benchmarks/results/ranks.json
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from provenance import processor, provenance
from rank_cases import CASES, HOLD_OUT, PLANS, busiest, case_named, imbalance_of, plans_of, read_case, routed, rows_of_ranks
from rank_processes import bind, mpirun
from rank_stacks import open_stack, write_stack

RANKS = 2
STEPS = {"prefill": 5, "decode": 15}
ROUNDS = {"prefill": 6, "decode": 20}
CACHES = 1 << 26  # bytes that a rank reads before each step


def tokens_of(case: str, kind: str) -> int:
    """Tokens of a step on all ranks together: a batch of the calibration, or a token of each of its sequences. The layers of the
    samples are small, so their batch is larger."""
    return 16 if kind == "decode" else 512 if case.startswith("OLMoE") else 4096


def prepare(folder: Path, cases: list[str]) -> None:
    for name in cases:
        case = case_named(name)
        case.write(folder / name)
        for policy, plan in plans_of(case.calibration, RANKS):
            write_stack(plan, folder / name / policy)
            print(f"{name}, {policy}: {plan.bytes_after / 1e6:.0f} MB of experts", flush=True)


def policies_in(folder: Path) -> list[str]:
    """The policies that were prepared, ``none`` first."""
    return [name for name, _, _ in PLANS if (folder / name).is_dir()]


def ids_of(router: np.ndarray, layer: int, top_k: int, tokens: int, step: int, rank: int) -> np.ndarray:
    """The experts of the tokens of ``rank``, int64 ``[tokens of a rank, top_k]``."""
    return routed(router, tokens // RANKS, top_k, HOLD_OUT * (step + 1) + rank + 100 * layer)


def loads_of(routers: list[np.ndarray], top_k: int, tokens: int, steps: int) -> list[np.ndarray]:
    """Rows of every expert in the timed steps, from all ranks, int64 ``[steps, m]`` for each layer."""
    return [
        np.array(
            [
                sum(
                    np.bincount(ids_of(router, layer, top_k, tokens, step, rank).ravel(), minlength=len(router))
                    for rank in range(RANKS)
                )
                for step in range(1, steps + 1)
            ]
        )
        for layer, router in enumerate(routers)
    ]


# In every rank


def step_of(routers: list[np.ndarray], geometry: Any, tokens: int, step: int, rank: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(HOLD_OUT * (step + 1) + rank)
    feeds: dict[str, np.ndarray] = {
        "x": random.standard_normal((tokens // RANKS, geometry.hidden), np.float32),
        "idle": np.zeros(1, np.int64),
    }
    for layer, router in enumerate(routers):
        feeds[f"ids{layer}"] = ids_of(router, layer, geometry.top_k, tokens, step, rank)
        feeds[f"gates{layer}"] = np.full((tokens // RANKS, geometry.top_k), 1 / geometry.top_k, np.float32)
    return feeds


def run_rank(folder: Path, output: Path, rounds: float) -> None:
    """Times all policies of a case. Rank 0 writes milliseconds ``[policy][kind][round]`` of the slowest rank, and the share of
    the time in which a rank did not have its core."""
    from rq_compile.engine.ranks import ranks

    world = ranks()
    bind(world.rank)
    case = read_case(folder)
    geometry = case.calibration.layers[0].geometry
    sessions = {policy: open_stack(folder / policy, world.rank) for policy in policies_in(folder)}
    times: dict[str, dict[str, list[float]]] = {policy: {kind: [] for kind in STEPS} for policy in sessions}
    others = np.ones(CACHES, np.uint8)
    wall = lost = 0.0
    for kind, count in STEPS.items():
        tokens = tokens_of(folder.name, kind)
        steps = [step_of(case.routers, geometry, tokens, number, world.rank) for number in range(count + 1)]
        for number, feeds in enumerate(steps):
            first = None
            for _ in range(round(rounds * ROUNDS[kind]) if number else 1):
                for policy, session in sessions.items():
                    others.max()
                    world.any(True)
                    start, used = time.perf_counter(), time.thread_time()
                    (y,) = session.run(None, feeds)
                    mine = time.perf_counter() - start
                    if number:  # the first step reads the weights
                        wall, lost = wall + mine, lost + mine - (time.thread_time() - used)
                        times[policy][kind].append(1e3 * max(world.gather(mine)))
                    first = y if first is None else first
                    assert np.linalg.norm(y - first) < 0.3 * np.linalg.norm(first), f"{policy} computes something else"
    interrupted = max(world.gather(lost / wall))
    if world.rank == 0:
        output.write_text(json.dumps({"times": times, "interrupted": interrupted}))


# Results


def step_time(plan: Any, case: Any, tokens: int) -> float:
    """The predicted time of a step on the calibration's loads."""
    from rq_compile.planning.costs import CostModel
    from rq_compile.planning.metrics import slot_loads

    model, total = CostModel("cpu", RANKS), 0.0
    for layer, calibrated in zip(plan.layers, case.calibration.layers, strict=True):
        rows = slot_loads(np.array(calibrated.load), [slot.expert for slot in layer.slots])
        total += model.step_time(layer.geometry, layer.slots, rows, tokens, np.zeros(len(layer.slots)))
    return total


def experts_read(plan: Any, loads: list[np.ndarray]) -> float:
    """The largest number of slots with rows on a rank, as a mean over layers and steps."""
    from rq_compile.planning.metrics import rank_loads, slot_loads

    most = [
        rank_loads(
            np.minimum(1, slot_loads(steps, [slot.expert for slot in layer.slots])),
            [slot.rank for slot in layer.slots],
            plan.ranks,
        ).max(axis=1)
        for layer, steps in zip(plan.layers, loads, strict=True)
    ]
    return float(np.mean(most))


def timed(folder: Path, rounds: float) -> Iterator[dict[str, Any]]:
    from rq_compile.planning.schema import Plan

    output = folder / "times.json"
    os.sync()  # the kernel would write what `prepare` wrote on the cores of the ranks
    mpirun(RANKS, __file__, "rank", folder, "-o", output, "--rounds", rounds)
    measured = json.loads(output.read_text())
    plans = {policy: Plan.model_validate_json((folder / policy / "plan.json").read_bytes()) for policy in policies_in(folder)}
    case = read_case(folder)
    for kind, steps in STEPS.items():
        tokens = tokens_of(folder.name, kind)
        loads = loads_of(case.routers, plans["none"].layers[0].geometry.top_k, tokens, steps)
        predictions = {
            policy: (step_time(plan, case, tokens), imbalance_of(plan), busiest(rows_of_ranks(plan, loads)))
            for policy, plan in plans.items()
        }
        for policy, plan in plans.items():
            taken = measured["times"][policy][kind]
            ratios = np.array(taken) / np.array(measured["times"]["none"][kind])
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            relative = np.array(predictions[policy]) / predictions["none"]
            yield {
                "case": folder.name,
                "step": kind,
                "tokens": tokens,
                "policy": policy,
                "memory": round(plan.bytes_after / plan.bytes_before, 3),
                "slots": [len(layer.slots) for layer in plan.layers],
                "rank_imbalance_planned": round(predictions[policy][1], 3),
                "rank_imbalance_counted": round(predictions[policy][2], 3),
                "experts_read": round(experts_read(plan, loads), 1),
                "runs": len(taken),
                "ms": round(median(taken), 3),
                "time_ratio": round(float(middle), 3),
                "time_ratio_quartiles": [round(float(low), 3), round(float(high), 3)],
                **dict(zip(("predicted", "imbalance", "counted"), relative.round(3).tolist(), strict=True)),
                "interrupted": round(measured["interrupted"], 4),
                "processor": processor(),
                **provenance("onnxruntime", "numpy", "mpich"),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["prepare", "time", "rank"])
    parser.add_argument("folder", type=Path, help="where the stacks are prepared")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, metavar="CASE")
    parser.add_argument("--rounds", type=float, default=1, help="multiplies how often each step runs")
    parser.add_argument("-o", "--output", type=Path, help="file for the rows, JSON; rows of other cases in it are kept")
    arguments = parser.parse_args()
    if arguments.do == "prepare":
        prepare(arguments.folder, arguments.cases)
    elif arguments.do == "rank":
        run_rank(arguments.folder, arguments.output, arguments.rounds)
    else:
        known = json.loads(arguments.output.read_text()) if arguments.output and arguments.output.exists() else []
        rows = [row for row in known if row["case"] not in arguments.cases]
        for name in arguments.cases:
            for row in timed(arguments.folder / name, arguments.rounds):
                print({key: row[key] for key in list(row)[: list(row).index("processor")]}, flush=True)
                rows.append(row)
            if arguments.output:
                arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
