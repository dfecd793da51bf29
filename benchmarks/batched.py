"""What a plan gains with the batched lowering: padded rows and time of a layer, with and without a plan, on loads not used for
it.

The loads are a real model's: plans are made from ``--calibration``; rows come from the batches of ``--heldout``, a second
calibration of the same model on different text. The timed layer has the model's experts and slots, and matrices of ``--hidden``
and ``--intermediate``. All variants of a layer and format run in turn on the same batches, so that other load on the machine
affects all of them equally; ``ms`` is a median, and ``time_ratio`` the median ratio of two runs of one round.

``goal`` is what ``time_ratio`` should not exceed: the padded rows with the plan divided by those without it, in as many classes,
divided by 0.8. Format "plan" is the plan unchanged, with mixed formats, within the memory that the model had; the other formats
are used for all slots.

    rq-compile calibrate samples/olmoe --text samples/text/dictionary.calibration.txt --text ... -o calibration.json
    rq-compile calibrate samples/olmoe --text samples/text/dictionary.heldout.txt --text ... -o heldout.json
    python benchmarks/batched.py --calibration calibration.json --heldout heldout.json -o benchmarks/results/batched.json
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from one_layer import LAYER, compiled, random_experts
from provenance import write_rows

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.calibration.schema import Calibration, LayerCalibration
from rq_compile.files import read_document
from rq_compile.planning import metrics
from rq_compile.planning.capacity import capacity_classes, lane_groups
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import LayerPlan, Plan, Slot

FORMATS = ("fp32", "int8", "int4", "plan")
CLASSES = (1, 2, 3, 4, 6)


class Variant(NamedTuple):
    """Slots of one layer, and how its lanes may be divided."""

    policy: str
    classes: int
    slots: list[Slot]

    @property
    def experts(self) -> list[int]:
        return [slot.expert for slot in self.slots]

    def padded_rows(self, loads: np.ndarray) -> np.ndarray:
        """The rows ``[B]`` that all products compute for batches with ``loads [B, m]``."""
        return metrics.padded_work(metrics.slot_loads(loads, self.experts), lane_groups(self.slots)) * loads.sum(axis=1)


def variants(plans: dict[str, LayerPlan], calibration: LayerCalibration, format: str) -> list[Variant]:
    found = []
    for policy, plan in plans.items():
        slots = plan.slots if format == "plan" else [slot.model_copy(update={"format": format}) for slot in plan.slots]
        rows = metrics.slot_loads(np.array(calibration.text_loads), [slot.expert for slot in slots])
        shares = rows / rows.sum(axis=1, keepdims=True)
        for classes in CLASSES:
            labels = capacity_classes(shares, [slot.format for slot in slots], classes)
            cut = [slot.model_copy(update={"capacity_class": int(c)}) for slot, c in zip(slots, labels, strict=True)]
            found.append(Variant(policy, classes, cut))
    return found


def batch(load: np.ndarray, geometry: ExpertGeometry, seed: int) -> dict[str, np.ndarray]:
    """Random tokens that choose each expert as often as ``load [m]`` says. No token chooses an expert twice."""
    random = np.random.default_rng(seed)
    tokens = int(load.sum()) // geometry.top_k
    chosen = np.repeat(np.arange(len(load)), load).reshape(geometry.top_k, tokens).T
    gates = random.random((tokens, geometry.top_k), np.float32)
    x = random.standard_normal((tokens, geometry.hidden), np.float32)
    return {"x": x, "ids": random.permutation(chosen).astype(np.int64), "gates": gates}


def timed(built: list[onnxruntime.InferenceSession], batches: list[dict], rounds: int) -> np.ndarray:
    """Milliseconds ``[sessions, runs]``. In one round of runs, all sessions get the same batch, and their results are
    compared."""
    times: list[list[float]] = [[] for _ in built]
    for inputs in batches:
        first = None
        for number in range(rounds + 1):
            for session, recorded in zip(built, times, strict=True):
                start = time.perf_counter()
                (y,) = session.run(["y"], inputs)
                if number:
                    recorded.append((time.perf_counter() - start) * 1e3)
                first = y if first is None else first
                assert np.linalg.norm(y - first) < 0.2 * np.linalg.norm(first), "a variant computes something else"
    return np.array(times)


def rows_of_layer(
    layer: LayerCalibration, heldout: LayerCalibration, plans: dict[str, Plan], args: argparse.Namespace
) -> Iterator[dict]:
    of_layer = {policy: next(p for p in plan.layers if p.name == layer.name) for policy, plan in plans.items()}
    geometry = layer.geometry.model_copy(update={"hidden": args.hidden, "intermediate": args.intermediate, "bias": False})
    loads = metrics.over_batches(np.array(heldout.batch_loads), args.batches_a_step)
    steps = loads[np.linspace(0, len(loads) - 1, args.steps).round().astype(int)]
    inputs = [batch(load, geometry, seed) for seed, load in enumerate(steps)]
    experts = random_experts(geometry)
    for format in args.formats:
        tried = variants(of_layer, layer, format)
        built = []
        with tempfile.TemporaryDirectory() as folder:
            for number, variant in enumerate(tried):
                (path := Path(folder) / str(number)).mkdir()
                timing = of_layer[variant.policy].model_copy(update={"name": LAYER, "geometry": geometry, "slots": variant.slots})
                plan = plans[variant.policy].model_copy(update={"layers": [timing]})
                built.append(compiled(plan, experts, "batched", path, threads=args.threads).session)
            milliseconds = timed(built, inputs, args.rounds)
        unplanned = {v.classes: (v, ms) for v, ms in zip(tried, milliseconds, strict=True) if v.policy == "none"}
        for variant, ms in zip(tried, milliseconds, strict=True):
            without, without_ms = unplanned[variant.classes]
            slot_rows = metrics.slot_loads(steps, variant.experts)
            padded = variant.padded_rows(steps)
            goal = mean(padded / without.padded_rows(steps)) / 0.8
            yield {
                "layer": layer.index,
                "format": format,
                "policy": variant.policy,
                "classes": variant.classes,
                "slots": len(variant.slots),
                "products": int(lane_groups(variant.slots).max()) + 1,
                "tokens": int(steps[0].sum()) // geometry.top_k,
                "lis": round(float(metrics.lis(slot_rows, geometry.experts).mean()), 3),
                "strict_lis": round(float(metrics.strict_lis(slot_rows).mean()), 3),
                "useful_rows": int(steps.sum(axis=1).mean()),
                "padded_rows": int(padded.mean()),
                "padded_over_useful": round(float((padded / steps.sum(axis=1)).mean()), 3),
                "padded_over_useful_all_batches": round(float((variant.padded_rows(loads) / loads.sum(axis=1)).mean()), 3),
                "ms": round(float(np.median(ms)), 2),
                "time_ratio": round(float(np.median(ms / without_ms)), 3),
                "goal": round(goal, 3),
            }


def report(row: dict) -> None:
    head = f"layer {row['layer']:<2} {row['format']:5} {row['policy']:8} {row['classes']} classes {row['products']:2} products"
    work = f"{row['slots']:3} slots LIS {row['lis']:.2f} strict {row['strict_lis']:.2f}"
    padded = (
        f"padded {row['padded_rows']:6} ({row['padded_over_useful']:.2f} x; {row['padded_over_useful_all_batches']:.2f} x on all)"
    )
    met = "" if row["policy"] == "none" else f" {row['time_ratio']:.2f} of unplanned (goal {row['goal']:.2f})"
    print(f"{head} {work} {padded} {row['ms']:8.1f} ms{met}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--policy", default="optimal", help="policy to compare with policy none")
    parser.add_argument("--memory", type=float, default=1.0)
    parser.add_argument("--layers", nargs="+", type=int, help="decoder layers to time; default: all")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--batches-a-step", type=int, default=1, help="held-out batches per step")
    parser.add_argument("--steps", type=int, default=2, help="steps to time, spread over the held-out text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="file for the rows, JSON")
    args = parser.parse_args()
    calibration, heldout = (read_document(Calibration, path) for path in (args.calibration, args.heldout))
    plans = {
        policy: make_plan(calibration, policy=policy, memory=args.memory, ranks=1, target="batched")
        for policy in ("none", args.policy)
    }
    rows: list[dict] = []
    for layer, other in zip(calibration.layers, heldout.layers, strict=True):
        if args.layers is None or layer.index in args.layers:
            for row in rows_of_layer(layer, other, plans, args):
                report(row)
                rows.append(row)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_rows(args.output, rows)


if __name__ == "__main__":
    main()
