"""Copies of an expert in one format on one device are stored once: in the budget, in what is reported, and in engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import planning_inputs as inputs
import pytest
from command_line import Run
from mpi import spread
from plans import plan_of, replicated_and_quantized, unchanged

from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.calibration.schema import Calibration
from rq_compile.errors import UserError
from rq_compile.files import read_document, write_document
from rq_compile.lowerings import lowering_of
from rq_compile.planning.plan import make_plan
from rq_compile.planning.replan import replan
from rq_compile.planning.schema import LayerPlan, Plan, Slot
from rq_compile.planning.sweep import point_of
from rq_compile.targets.onnxruntime import compile_engine

ERRORS = {"int8": [1e-5] * 4, "int4": [1e-3] * 4}
EPLB: dict[str, Any] = {"policy": "eplb", "memory": 1.0, "slots": 6}


def skewed() -> Calibration:
    return inputs.calibration([inputs.layer([[70, 10, 10, 10]], ERRORS), inputs.layer([[20, 30, 25, 25]], ERRORS, place=1)])


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt"])
def test_on_one_device_copies_take_no_bytes_of_the_budget(target: str) -> None:
    plan = make_plan(skewed(), **EPLB, ranks=1, target=target)
    assert [len(layer.slots) for layer in plan.layers] == [6, 6]
    assert plan.stored_bytes == plan.bytes_before
    assert 4 * plan.bytes_after == 6 * plan.bytes_before
    assert point_of(plan).bytes == plan.stored_bytes
    told = next(remark for remark in plan.remarks if "alias" in remark)
    assert f"{plan.stored_bytes / 1e6:.2f} MB for slots of {plan.bytes_after / 1e6:.2f} MB" in told


@pytest.mark.parametrize(("target", "ranks"), [("batched", 1), ("tensorrt-rtx", 1), ("cpu", 2), ("cuda", 2)])
def test_elsewhere_every_copy_takes_its_bytes(target: str, ranks: int) -> None:
    with pytest.raises(UserError, match=r"more than --memory 1 allows; give --memory 1\.5 or more"):
        make_plan(skewed(), **EPLB, ranks=ranks, target=target)
    plan = make_plan(skewed(), **(EPLB | {"memory": 1.5}), ranks=ranks, target=target)
    assert point_of(plan).bytes == plan.bytes_after
    assert (plan.stored_bytes < plan.bytes_after) == (ranks == 1)


def test_a_copy_in_another_format_takes_bytes() -> None:
    plan = make_plan(skewed(), policy="paper", memory=1.0, ranks=1, target="cpu")
    assert plan.stored_bytes == plan.bytes_after


def test_eplb_does_not_ask_for_memory_that_copies_do_not_take() -> None:
    told = make_plan(skewed(), policy="eplb", memory=1.0, ranks=1, target="cpu").remarks[-1]
    assert "take no bytes" in told
    assert "--memory" not in told


def test_replan_counts_the_same_bytes() -> None:
    calibration = skewed()
    plan = make_plan(calibration, **EPLB, ranks=1, target="cpu")
    new, changes = replan(plan, calibration)
    assert changes.count == 0
    assert new.stored_bytes == plan.stored_bytes
    batched = plan.model_copy(update={"target": "batched"})
    with pytest.raises(UserError, match="more than --memory 1 allows"):
        replan(batched, calibration)


def rank_of(layer: LayerPlan, place: int, slot: Slot) -> int:
    return place // 2 % 2


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("lowering", ["native", "stock", "ranks"])
def test_every_lowering_for_the_cpu_but_batched_stores_what_the_plan_says(
    family: str, lowering: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """With biases, which are stored for each slot, and without."""
    checkpoint = Model.open(tiny_checkpoint(family))
    plans = [plan_of(checkpoint, slots) for slots in (unchanged, replicated_and_quantized)]
    if lowering == "ranks":  # some copies share a rank, some do not
        plans = [spread(plan_of(checkpoint, replicated_and_quantized), 2, rank_of)]
    for plan in plans:
        weights = [weight for layer in plan.layers for weight in lowering_of(lowering).expert_weights(layer)]
        assert sum(weight.bytes for weight in weights) == plan.stored_bytes


def four_of_each(layer: MoeLayer) -> list[Slot]:
    return 4 * unchanged(layer)


def test_copies_add_nothing_on_a_gpu(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Its floats may take fewer bytes than those of the plan."""
    checkpoint, cuda = Model.open(tiny_checkpoint("olmoe")), lowering_of("cuda")
    plans = [plan_of(checkpoint, slots) for slots in (unchanged, four_of_each)]
    stored = [sum(weight.bytes for layer in plan.layers for weight in cuda.expert_weights(layer)) for plan in plans]
    assert stored[0] == stored[1] > 0


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_an_engine_stores_equal_copies_once(
    family: str,
    tiny_checkpoint: Callable[[str], Path],
    export_once: Callable,
    rq_compile: Run,
    tmp_path: Path,
) -> None:
    """The weights file of four copies of every expert is that of one copy, and what is shown says so."""
    checkpoint = Model.open(tiny_checkpoint(family))
    made: dict[str, Plan] = {}
    for name, slots in (("one", unchanged), ("four", four_of_each)):
        made[name] = plan_of(checkpoint, slots)
        manifest = compile_engine(checkpoint, made[name], tmp_path / f"{name}.onnx", exported=export_once(checkpoint))
        assert manifest.expert_bytes == made[name].stored_bytes
    biases = sum(3 * len(unchanged(layer)) * layer.geometry.bias_bytes for layer in checkpoint.layers)
    assert made["four"].stored_bytes - made["one"].stored_bytes == biases
    graph = onnx.load(tmp_path / "four.onnx", load_external_data=False).graph
    experts = checkpoint.layers[0].geometry.experts
    panels = [tensor for tensor in graph.initializer if tensor.name.endswith((".up.weight", ".down.weight"))]
    assert {tensor.dims[0] for tensor in panels if "experts" in tensor.name} <= {experts}
    one, of_four = (np.fromfile(tmp_path / f"{name}.onnx.data", np.uint8) for name in ("one", "four"))
    if not biases:
        assert np.array_equal(one, of_four)
    shown = rq_compile("inspect", tmp_path / "four.onnx").stdout
    assert f"({made['four'].stored_bytes / made['four'].bytes_before:.3f})" in " ".join(shown.split())


def test_the_plan_shows_both_bytes(stages: Path, rq_compile: Run, tmp_path: Path) -> None:
    plan = read_document(Plan, stages / "plan.json")
    doubled = [layer.model_copy(update={"slots": [*layer.slots, layer.slots[0]]}) for layer in plan.layers]
    write_document(plan.model_copy(update={"layers": doubled}), tmp_path / "plan.json")
    shown = " ".join(rq_compile("inspect", tmp_path / "plan.json").stdout.split())
    for size in (plan.bytes_after, plan.stored_bytes):
        assert f"{size / 1e6:.2f} MB ({size / plan.bytes_before:.3f})" in shown
