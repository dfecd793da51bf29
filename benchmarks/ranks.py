"""What a balanced plan saves where ranks run side by side: the time of MoE layers on 2 ranks, processes of one thread each.

A case is a stack of MoE layers without anything between them, so that the time is that of the MoE part with its exchange. Two
stacks have OLMoE's shape (64 experts, top-8, 2048 x 1024) and a router whose loads have the Gini coefficients that were measured
(0.44 and 0.65). The others have the shape and the loads of the models in samples/, which are calibrated first. Plans are made
from one set of tokens; steps use others. Weights are random. All policies of a case take turns in the same processes; ``ms`` is
the median over steps of the slowest rank's time, and ``time_ratio`` the median ratio to ``none`` in the same round.

``predicted`` is the plan's rank imbalance over that of ``none``; ``counted`` the same, from the rows of the timed steps;
``cost_model`` the plan's predicted time over that of ``none``, with the exchange.

    python benchmarks/ranks.py prepare /tmp/ranks            # minutes: calibrates, plans, writes the stacks
    python benchmarks/ranks.py time /tmp/ranks --cases "OLMoE, Gini 0.44" -o benchmarks/results/ranks.json
    python benchmarks/ranks.py exchange                      # latency of a message and bytes per second, for planning/targets.py
    python benchmarks/ranks.py count /tmp/ranks              # rows per rank and step on 4, 8 and 64 ranks; nothing is timed
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from provenance import processor, provenance

ROOT = Path(__file__).parents[1]
SAMPLES = ("olmoe", "qwen2-moe", "top1", "deepseek-v2")
KINDS = ("scripture", "hacker", "dictionary")
GINIS = (0.44, 0.65)
# Policy and memory.
PLANS = (("none", 1.0), ("place", 1.0), ("eplb", 1.25), ("paper", 1.0), ("optimal", 1.0))
TOKENS = {"prefill": 512, "decode": 16}  # of a step, on all ranks together
STEPS = {"prefill": 5, "decode": 15}
LAYERS = 2  # of an OLMoE-shaped stack
CALIBRATED = 16384  # tokens
RANKS = 2
HOLD_OUT = 1000  # seeds of the timed steps begin here


# The cases


def routed(weights: np.ndarray, tokens: int, top_k: int, seed: int) -> np.ndarray:
    """int64 [tokens, top_k]: experts of random tokens that prefer those with large ``weights [m]``; none is chosen twice."""
    noise = np.random.default_rng(seed).gumbel(size=(tokens, len(weights)))
    return np.argsort(-(np.log(weights) + noise), axis=1)[:, :top_k].astype(np.int64)


def gini(load: np.ndarray) -> float:
    ordered = np.sort(load)
    return float(np.abs(ordered[:, None] - ordered).sum() / (2 * len(ordered) * ordered.sum()))


def skewed_router(goal: float, experts: int, top_k: int, seed: int) -> np.ndarray:
    """Lognormal weights ``[m]`` with which the loads have the Gini coefficient ``goal``."""
    base = np.random.default_rng(seed).standard_normal(experts)
    low, high = 0.0, 5.0
    for _ in range(30):
        sigma = (low + high) / 2
        load = np.bincount(routed(np.exp(sigma * base), 4096, top_k, seed).ravel(), minlength=experts)
        low, high = (sigma, high) if gini(load) < goal else (low, sigma)
    return np.exp(sigma * base)


def of_olmoe(goal: float) -> Any:
    """A calibration of layers with OLMoE's shape, and the routers' weights."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from planning_inputs import calibration, layer

    made, routers = [], []
    for number in range(LAYERS):
        router = skewed_router(goal, 64, 8, seed=round(100 * goal) + number)
        batches = [np.bincount(routed(router, CALIBRATED // 32, 8, seed).ravel(), minlength=64) for seed in range(32)]
        load = np.sum(batches, axis=0)
        share = (load / load.sum()).tolist()
        errors = {"int8": [2.5e-5 * s for s in share], "int4": [6e-3 * s for s in share]}
        shape = {"place": number, "top_k": 8, "hidden": 2048, "intermediate": 1024, "wanda": share}
        made.append(layer([load.tolist()], errors, batches=[batch.tolist() for batch in batches], **shape))
        routers.append(router)
    return calibration(made), routers


def of_sample(name: str, folder: Path) -> Any:
    """The calibration of a sample, and its routers' weights on held-out text."""
    from rq_compile.architectures.model import Model
    from rq_compile.calibration.calibrate import calibrate

    found = []
    for part, tokens in (("calibration", CALIBRATED), ("heldout", CALIBRATED // 2)):
        texts = {kind: (ROOT / "samples" / "text" / f"{kind}.{part}.txt").read_text() for kind in KINDS}
        made, _ = calibrate(
            Model.open(ROOT / "samples" / name),
            texts,
            tokens=tokens,
            batch_size=4,
            sequence_length=256,
            quantizer="nearest",
            progress=lambda done, total: None,
        )
        found.append(made)
    calibration, heldout = found
    return calibration, [np.array(layer.load) + 0.5 for layer in heldout.layers]


def plans_of(calibration: Any, ranks: int) -> Iterator[tuple[str, Any]]:
    from rq_compile.planning.plan import make_plan

    for policy, memory in PLANS:
        yield policy, make_plan(calibration, policy=policy, memory=memory, ranks=ranks, target="cpu", tokens=TOKENS["prefill"])


# Stacks of layers


def stack(plan: Any) -> Any:
    """Experts nodes, one after the other, each with its own ids and gates."""
    from onnx import TensorProto, helper

    geometry, inputs, nodes, value = plan.layers[0].geometry, [("x", TensorProto.FLOAT, plan.layers[0].geometry.hidden)], [], "x"
    for number, layer in enumerate(plan.layers):
        ids, gates, y = f"ids{number}", f"gates{number}", f"y{number}"
        nodes.append(helper.make_node("Experts", [value, ids, gates], [y], domain="rq.moe", layer=layer.name))
        inputs += [(ids, TensorProto.INT64, geometry.top_k), (gates, TensorProto.FLOAT, geometry.top_k)]
        value = y
    described = [helper.make_tensor_value_info(name, kind, ["T", size]) for name, kind, size in inputs]
    result = helper.make_tensor_value_info(value, TensorProto.FLOAT, ["T", geometry.hidden])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("rq.moe", 1)]
    return helper.make_model(helper.make_graph(nodes, "stack", described, [result]), opset_imports=imports, ir_version=10)


def write_stack(plan: Any, folder: Path) -> None:
    from rq_compile.architectures.layers import ExpertWeights
    from rq_compile.lowerings.ranks import Ranks
    from rq_compile.targets.weights_file import locate, write_weights

    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(plan.model_dump_json())
    geometry, random = plan.layers[0].geometry, np.random.default_rng(0)
    up, down = (
        (random.standard_normal(shape, np.float32) / np.sqrt(shape[1]))
        for shape in ((geometry.up_rows, geometry.hidden), (geometry.hidden, geometry.intermediate))
    )
    biases = (np.zeros(len(up), np.float32), np.zeros(len(down), np.float32)) if geometry.bias else (None, None)
    expert = ExpertWeights(up, down, *biases)  # the same for all: times do not depend on the values
    for rank, lowered in enumerate(Ranks().graphs(stack(plan), plan, lambda layer, number: expert)):
        data = folder / f"rank{rank}.data"
        with data.open("wb+") as file:
            written = write_weights(lowered.experts, file)
        locate(lowered.model, written.starts, data.name)
        (folder / f"rank{rank}.onnx").write_bytes(lowered.model.SerializeToString())


def prepare(folder: Path, cases: list[str]) -> None:
    for name in cases:
        calibration, routers = of_olmoe(float(name.split()[-1])) if name.startswith("OLMoE") else of_sample(name, folder)
        case = folder / name
        case.mkdir(parents=True)
        np.savez(case / "routers.npz", *routers)
        (case / "calibration.json").write_text(calibration.model_dump_json())
        for policy, plan in plans_of(calibration, RANKS):
            write_stack(plan, case / policy)
            print(f"{name}, {policy}: {plan.bytes_after / 1e6:.0f} MB of experts", flush=True)


# Timing, in every rank


def step_of(routers: list[np.ndarray], geometry: Any, kind: str, number: int, rank: int, ranks: int) -> dict[str, np.ndarray]:
    tokens = TOKENS[kind] // ranks
    seed = HOLD_OUT * (number + 1) + rank
    random = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {
        "x": random.standard_normal((tokens, geometry.hidden), np.float32),
        "idle": np.zeros(1, np.int64),
    }
    for layer, router in enumerate(routers):
        feeds[f"ids{layer}"] = routed(router, tokens, geometry.top_k, seed + 100 * layer)
        feeds[f"gates{layer}"] = np.full((tokens, geometry.top_k), 1 / geometry.top_k, np.float32)
    return feeds


def open_stack(folder: Path, rank: int) -> Any:
    import onnxruntime

    from rq_compile.engine.library import MPI_LIBRARY, library_path

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for library in (library_path(), library_path(MPI_LIBRARY)):
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(folder / f"rank{rank}.onnx"), options, providers=["CPUExecutionProvider"])


def run_rank(case: Path, output: Path, rounds: int) -> None:
    """Times all policies of a case and writes, on rank 0, milliseconds ``[policy][kind][round]`` of the slowest rank."""
    from rq_compile.engine.ranks import ranks
    from rq_compile.planning.schema import Plan

    world = ranks()
    bind(world.rank)
    with np.load(case / "routers.npz") as held:
        routers = list(held.values())
    policies = [policy for policy, _ in PLANS]
    plan = Plan.model_validate_json((case / "none" / "plan.json").read_bytes())
    geometry = plan.layers[0].geometry
    sessions = {policy: open_stack(case / policy, world.rank) for policy in policies}
    times: dict[str, dict[str, list[float]]] = {policy: {kind: [] for kind in TOKENS} for policy in policies}
    for kind in TOKENS:
        steps = [step_of(routers, geometry, kind, number, world.rank, world.size) for number in range(STEPS[kind] + 1)]
        for number, feeds in enumerate(steps):
            first = None
            for _ in range(rounds if number else 1):
                for policy, session in sessions.items():
                    world.any(True)
                    start = time.perf_counter()
                    (y,) = session.run(None, feeds)
                    took = max(world.gather(time.perf_counter() - start))
                    if number:  # the first reads the weights
                        times[policy][kind].append(1e3 * took)
                    first = y if first is None else first
                    assert np.linalg.norm(y - first) < 0.3 * np.linalg.norm(first), f"{policy} computes something else"
    if world.rank == 0:
        output.write_text(json.dumps(times))


def bind(rank: int) -> None:
    """One core for each rank, as ``mpirun --bind-to core`` would."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def mpirun(ranks: int, *arguments: object) -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    program = [sys.executable, __file__, *map(str, arguments)]
    subprocess.run([str(mpiexec) if mpiexec.exists() else "mpiexec", "-n", str(ranks), *program], check=True)


# Rows


def rows_of_ranks(plan: Any, routers: list[np.ndarray], kind: str) -> list[np.ndarray]:
    """Rows ``[steps, ranks]`` of each layer in the timed steps."""
    from rq_compile.planning.metrics import rank_loads, slot_loads

    found = []
    for number, (layer, router) in enumerate(zip(plan.layers, routers, strict=True)):
        loads = []
        for step in range(1, STEPS[kind] + 1):
            ids = [
                routed(router, TOKENS[kind] // RANKS, layer.geometry.top_k, HOLD_OUT * (step + 1) + rank + 100 * number)
                for rank in range(RANKS)
            ]
            loads.append(np.bincount(np.concatenate(ids).ravel(), minlength=layer.geometry.experts))
        rows = slot_loads(np.array(loads), [slot.expert for slot in layer.slots])
        found.append(rank_loads(rows, [slot.rank for slot in layer.slots], plan.ranks))
    return found


def busiest(rows: list[np.ndarray]) -> float:
    """The busiest rank over the mean, weighted by the rows of the steps."""
    return float(sum(layer.max(axis=1).sum() for layer in rows) / sum(layer.mean(axis=1).sum() for layer in rows))


def imbalance_of(plan: Any) -> float:
    """The busiest rank over the mean on the calibration's loads, as the plan predicts it; the mean over the layers."""
    imbalances: list[float] = [layer.predicted.rank_imbalance_after for layer in plan.layers]
    return mean(imbalances)


def timed(case: Path, rounds: int) -> Iterator[dict[str, Any]]:
    from rq_compile.planning.costs import CostModel
    from rq_compile.planning.metrics import slot_loads
    from rq_compile.planning.schema import Plan

    output = case / "times.json"
    mpirun(RANKS, "rank", case, "-o", output, "--rounds", rounds)
    times = json.loads(output.read_text())
    plans = {policy: Plan.model_validate_json((case / policy / "plan.json").read_bytes()) for policy, _ in PLANS}
    with np.load(case / "routers.npz") as held:
        routers = list(held.values())
    loads = [np.array(layer["load"]) for layer in json.loads((case / "calibration.json").read_text())["layers"]]

    def cost(plan: Plan, kind: str) -> float:
        model = CostModel("cpu", RANKS)
        return sum(
            model.step_time(
                layer.geometry,
                layer.slots,
                slot_loads(load, [s.expert for s in layer.slots]),
                TOKENS[kind],
                np.zeros(len(layer.slots)),
            )
            for layer, load in zip(plan.layers, loads, strict=True)
        )

    for kind in TOKENS:
        imbalance = {policy: imbalance_of(plan) for policy, plan in plans.items()}
        counted = {policy: busiest(rows_of_ranks(plan, routers, kind)) for policy, plan in plans.items()}
        for policy, plan in plans.items():
            ratios = np.array(times[policy][kind]) / np.array(times["none"][kind])
            low, high = np.quantile(ratios, [0.25, 0.75])
            yield {
                "case": case.name,
                "step": kind,
                "tokens": TOKENS[kind],
                "policy": policy,
                "memory": round(plan.bytes_after / plan.bytes_before, 3),
                "slots": [len(layer.slots) for layer in plan.layers],
                "rank_imbalance_predicted": round(imbalance[policy], 3),
                "rank_imbalance_counted": round(counted[policy], 3),
                "ms": round(median(times[policy][kind]), 3),
                "time_ratio": round(float(np.median(ratios)), 3),
                "time_ratio_quartiles": [round(float(low), 3), round(float(high), 3)],
                "predicted": round(imbalance[policy] / imbalance["none"], 3),
                "counted": round(counted[policy] / counted["none"], 3),
                "cost_model": round(cost(plan, kind) / cost(plans["none"], kind), 3),
                "processor": processor(),
                **provenance("onnxruntime", "numpy", "mpich"),
            }


def counted(folder: Path, cases: list[str]) -> Iterator[dict[str, Any]]:
    """The busiest rank with 4, 8 and 64 ranks, on the routers of the cases, and the times that the cost model predicts."""
    from rq_compile.calibration.schema import Calibration

    for name in cases:
        calibration = Calibration.model_validate_json((folder / name / "calibration.json").read_bytes())
        with np.load(folder / name / "routers.npz") as held:
            routers = list(held.values())
        for ranks in (4, 8, 64):
            if ranks > calibration.layers[0].geometry.experts:
                continue
            first = 0.0
            for policy, plan in plans_of(calibration, ranks):
                step_time = float(sum(layer.predicted.step_time_after for layer in plan.layers))
                first = first or step_time
                yield {
                    "case": name,
                    "ranks": ranks,
                    "policy": policy,
                    "memory": round(plan.bytes_after / plan.bytes_before, 3),
                    "rank_imbalance_predicted": round(imbalance_of(plan), 3),
                    "rank_imbalance_counted": {kind: round(busiest(rows_of_ranks(plan, routers, kind)), 3) for kind in TOKENS},
                    "cost_model": round(step_time / first, 3),
                    **provenance("numpy"),
                }


# The exchange


def exchange_rank(repeats: int = 1000) -> None:
    """Prints seconds of a step without rows to exchange, and bytes per second with many, for two ranks of one host."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import onnxruntime
    from onnx import TensorProto, helper

    from rq_compile.engine.library import MPI_LIBRARY, library_path
    from rq_compile.engine.ranks import ranks

    world = ranks()
    bind(world.rank)
    described = [
        ("x", TensorProto.FLOAT, 2),
        ("ids", TensorProto.INT64, 2),
        ("replicas", TensorProto.INT32, 2),
        ("idle", TensorProto.INT64, 1),
    ]
    inputs = [helper.make_tensor_value_info(name, kind, [None] * rank) for name, kind, rank in described]
    outputs = [helper.make_tensor_value_info("back", TensorProto.FLOAT, [None, None])]
    made = ["arrived", "rows", "offsets", "outgoing", "exchanged"]
    experts = 64
    options: dict[str, Any] = {
        "domain": "rq.moe.mpi",
        "ranks": [e * world.size // experts for e in range(experts)],
        "rank": world.rank,
        "size": world.size,
    }
    nodes = [
        helper.make_node("ExchangeDispatch", ["x", "ids", "replicas", "idle"], made, **options),
        helper.make_node("ExchangeReturn", ["arrived", "rows", "outgoing", "exchanged"], ["back"], domain="rq.moe.mpi"),
    ]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("rq.moe.mpi", 2)]
    model = helper.make_model(helper.make_graph(nodes, "exchange", inputs, outputs), opset_imports=imports, ir_version=10)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = 1
    session_options.register_custom_ops_library(str(library_path(MPI_LIBRARY)))
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options, providers=["CPUExecutionProvider"])
    replicas = np.arange(experts, dtype=np.int32)[:, None]
    for hidden, tokens in ((2048, 1), (2048, 16), (2048, 256), (4096, 256), (256, 256)):
        # Half of the pairs stay, half leave: 4 of 8 of each token.
        ids = np.tile(np.arange(8) * 8, (tokens, 1)).astype(np.int64)
        feeds = {"x": np.ones((tokens, hidden), np.float32), "ids": ids, "replicas": replicas, "idle": np.zeros(1, np.int64)}
        took = []
        for _ in range(repeats if tokens == 1 else repeats // 20):
            world.any(True)
            start = time.perf_counter()
            session.run(None, feeds)
            took.append(max(world.gather(time.perf_counter() - start)))
        sent = tokens * 4 * hidden * 4
        if world.rank == 0:
            print(
                json.dumps(
                    {
                        "hidden": hidden,
                        "tokens": tokens,
                        "bytes_sent_each_way": sent,
                        "microseconds": round(1e6 * median(took), 2),
                    }
                )
            )


def all_cases() -> list[str]:
    return [*(f"OLMoE, Gini {goal}" for goal in GINIS), *SAMPLES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["prepare", "time", "exchange", "count", "rank", "exchange-rank"])
    parser.add_argument("folder", nargs="?", type=Path, help="where the stacks are prepared")
    parser.add_argument("--cases", nargs="+", default=all_cases(), choices=all_cases(), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=2, help="times that each step runs")
    parser.add_argument("-o", "--output", type=Path, help="file for the rows, JSON; rows of other cases in it are kept")
    arguments = parser.parse_args()
    if arguments.do == "exchange":
        mpirun(RANKS, "exchange-rank")
    elif arguments.do == "exchange-rank":
        exchange_rank()
    elif arguments.do == "prepare":
        prepare(arguments.folder, arguments.cases)
    elif arguments.do == "rank":
        run_rank(arguments.folder, arguments.output, arguments.rounds)
    else:
        rows: list[dict[str, Any]] = []
        if arguments.do == "time":
            found: Iterator[dict[str, Any]] = (
                row for name in arguments.cases for row in timed(arguments.folder / name, arguments.rounds)
            )
        else:
            found = counted(arguments.folder, arguments.cases)
        for row in found:
            print(
                {
                    key: value
                    for key, value in row.items()
                    if key not in ("processor", "commit", "date", "onnxruntime", "numpy", "mpich")
                },
                flush=True,
            )
            rows.append(row)
        if arguments.output:
            known = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
            new = {(row["case"], row.get("ranks")) for row in rows}
            kept = [row for row in known if (row["case"], row.get("ranks")) not in new]
            arguments.output.write_text(json.dumps(kept + rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
