"""The cases of ranks.py and rank_counts.py: layers, routers, and the plans of every policy.

Two cases have OLMoE's shape (64 experts, top-8, 2048 x 1024) and a router whose loads have the Gini coefficients that were
measured (0.44 and 0.65). The others have the shape and the loads of the models in samples/, which are calibrated first. Plans are
made from one set of tokens, and steps use others.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
SAMPLES = ("olmoe", "qwen2-moe", "top1", "deepseek-v2")
KINDS = ("scripture", "hacker", "dictionary")
GINIS = (0.44, 0.65)
CASES = (*(f"OLMoE, Gini {goal}" for goal in GINIS), *SAMPLES)
ALONE = "optimal, prefill"  # planned for prefill alone, without regard to decoding
# Name, policy and memory.
PLANS = (
    ("none", "none", 1.0),
    ("place", "place", 1.0),
    ("eplb", "eplb", 1.25),
    ("paper", "paper", 1.0),
    ("optimal", "optimal", 1.0),
    (ALONE, "optimal", 1.0),
)
LAYERS = 2  # with OLMoE's shape
CALIBRATED = 16384  # tokens
BATCHES = 32  # of the calibrated tokens of the OLMoE shapes
SEQUENCES = 16  # of a batch
HOLD_OUT = 1000  # seeds of the steps begin here


@dataclass(frozen=True)
class Case:
    """``routers``: a weight for each expert of each layer, ``[m]``. ``recorded``: loads of steps that the plans have not seen,
    int64 ``[steps, m]`` for each layer."""

    calibration: Any
    routers: list[np.ndarray]
    recorded: list[np.ndarray]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "calibration.json").write_text(self.calibration.model_dump_json())
        np.savez(folder / "routers.npz", *self.routers)
        np.savez(folder / "recorded.npz", *self.recorded)


def case_named(name: str) -> Case:
    return _of_olmoe(float(name.split()[-1])) if name.startswith("OLMoE") else _of_sample(name)


def read_case(folder: Path) -> Case:
    from rq_compile.calibration.schema import Calibration

    calibration = Calibration.model_validate_json((folder / "calibration.json").read_bytes())
    with np.load(folder / "routers.npz") as routers, np.load(folder / "recorded.npz") as recorded:
        return Case(calibration, list(routers.values()), list(recorded.values()))


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


def _of_olmoe(goal: float) -> Case:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from planning_inputs import calibration, layer

    def loads(router: np.ndarray, first: int) -> np.ndarray:
        seeds = range(first, first + BATCHES)
        return np.array([np.bincount(routed(router, CALIBRATED // BATCHES, 8, seed).ravel(), minlength=64) for seed in seeds])

    made, routers, recorded = [], [], []
    for number in range(LAYERS):
        router = skewed_router(goal, 64, 8, seed=round(100 * goal) + number)
        batches = loads(router, 0)
        load = batches.sum(axis=0)
        share = (load / load.sum()).tolist()
        errors = {"int8": [2.5e-5 * s for s in share], "int4": [6e-3 * s for s in share]}
        shape = {"place": number, "top_k": 8, "hidden": 2048, "intermediate": 1024, "wanda": share}
        made.append(layer([load.tolist()], errors, batches=batches.tolist(), **shape))
        routers.append(router)
        recorded.append(loads(router, HOLD_OUT))
    sizes = {"batch_size": SEQUENCES, "sequence_length": CALIBRATED // BATCHES // SEQUENCES}
    return Case(calibration(made).model_copy(update=sizes), routers, recorded)


def _of_sample(name: str) -> Case:
    """The sample calibrated on one part of the texts. The routers' weights and the recorded loads are those of the other part."""
    from rq_compile.architectures.model import Model
    from rq_compile.calibration.calibrate import calibrate

    found = []
    for part, tokens, sequences in (("calibration", CALIBRATED, SEQUENCES), ("heldout", CALIBRATED // 2, 4)):
        texts = {kind: (ROOT / "samples" / "text" / f"{kind}.{part}.txt").read_text() for kind in KINDS}
        made, _ = calibrate(
            Model.open(ROOT / "samples" / name),
            texts,
            tokens=tokens,
            batch_size=sequences,
            sequence_length=256,
            quantizer="nearest",
            progress=lambda done, total: None,
        )
        found.append(made)
    calibration, heldout = found
    return Case(
        calibration,
        [np.array(layer.load) + 0.5 for layer in heldout.layers],
        [np.array(layer.batch_loads) for layer in heldout.layers],
    )


def plans_of(calibration: Any, ranks: int, tokens: int = 0) -> Iterator[tuple[str, Any]]:
    """A plan of every policy, for the steps of the calibration or, if given, for steps of ``tokens`` tokens; and one of policy
    ``optimal`` for prefill alone if it is another."""
    from rq_compile.planning.plan import make_plan

    found: dict[str, Any] = {}
    for name, policy, memory in PLANS:
        steps = calibration.batch_size * calibration.sequence_length if name == ALONE else tokens
        found[name] = make_plan(calibration, policy=policy, memory=memory, ranks=ranks, target="cpu", tokens=steps)
    if tokens or found[ALONE].layers == found["optimal"].layers:
        del found[ALONE]
    yield from found.items()


def rows_of_ranks(plan: Any, loads: list[np.ndarray]) -> list[np.ndarray]:
    """Rows ``[steps, ranks]`` of each layer, from ``loads [steps, m]`` of each layer."""
    from rq_compile.planning.metrics import rank_loads, slot_loads

    return [
        rank_loads(slot_loads(steps, [slot.expert for slot in layer.slots]), [slot.rank for slot in layer.slots], plan.ranks)
        for layer, steps in zip(plan.layers, loads, strict=True)
    ]


def busiest(rows: list[np.ndarray]) -> float:
    """The busiest rank over the mean, weighted by the rows of the steps."""
    return float(sum(layer.max(axis=1).sum() for layer in rows) / sum(layer.mean(axis=1).sum() for layer in rows))


def imbalance_of(plan: Any) -> float:
    """The busiest rank over the mean on the calibration's loads, as the plan predicts it; the mean over the layers."""
    imbalances: list[float] = [layer.predicted.rank_imbalance_after for layer in plan.layers]
    return mean(imbalances)
