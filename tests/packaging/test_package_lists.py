"""What KTransformers and hybrid_bit_map take from a plan, read back by the rules of their readers; plans that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import planning_inputs as inputs
import pytest
import torch
from click.testing import Result
from command_line import refused

from rq_compile.calibration.recorded_loads import with_recorded_loads
from rq_compile.files import read_document, write_document
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan

Command = Callable[..., Result]


def written(folder: Path, **how: object) -> Path:
    """A plan of four layers, the first of them decoder layer 3."""
    path = folder / "plan.json"
    arguments: dict = {"policy": "optimal", "memory": 1.0, "ranks": 1, "target": "cpu"} | how
    write_document(make_plan(inputs.skewed(), **arguments), path)
    return path


def package(rq_compile: Command, plan: Path, destination: str, *options: object) -> dict:
    result = rq_compile("package", plan, "--for", destination, "-o", plan.with_name(destination), "--json", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def on_gpu(file: Path, number: int) -> dict[int, set[int]]:
    """The experts that KTransformers keeps on the GPU: the most frequent of each layer."""
    counts = torch.load(file, weights_only=True)["logical_count"].sum(dim=0)
    return {layer: set(torch.argsort(-row, stable=True)[:number].tolist()) for layer, row in enumerate(counts) if row.any()}


@pytest.mark.parametrize("how", [{}, {"policy": "eplb", "ranks": 4, "memory": 1.25, "target": "cuda"}])
def test_ktransformers_keeps_the_busiest_experts_on_the_gpu(rq_compile: Command, tmp_path: Path, how: dict) -> None:
    plan_file = written(tmp_path, **how)
    said = package(rq_compile, plan_file, "ktransformers", "--layers", 9)
    file = tmp_path / "ktransformers" / "expert_counts.pt"
    counts = torch.load(file, weights_only=True)["logical_count"]
    assert (tuple(counts.shape), counts.dtype) == ((1, 9, 16), torch.int64)
    calibration = inputs.skewed()
    loads = {layer.index: np.array(layer.load) for layer in calibration.layers}
    for layer, held in on_gpu(file, 4).items():
        assert loads[layer][sorted(held)].sum() == np.sort(loads[layer])[-4:].sum()
    assert set(on_gpu(file, 4)) == set(loads)
    kept = sum(np.sort(load)[-4:].sum() for load in loads.values()) / sum(load.sum() for load in loads.values())
    assert f"{100 * kept:.0f} % with 4" in said["remarks"][0]
    assert f"--kt-num-gpu-experts 4 --kt-expert-placement-strategy frequency --init-expert-location {file}" in said["run"][0]
    lost = " ".join(said["remarks"])
    replicas = sum(len(layer.slots) - 16 for layer in read_document(Plan, plan_file).layers)
    assert (f"{replicas} replicas are left out" in lost) == (replicas > 0)
    assert ("4 ranks are left out" in lost) == ("ranks" in how)
    # The loads can be planned from, as if SGLang had recorded them.
    again = with_recorded_loads(calibration, [file])
    for before, after in zip(calibration.layers, again.layers, strict=True):
        np.testing.assert_allclose(np.array(after.load) / sum(after.load), np.array(before.load) / sum(before.load), atol=1e-6)


def test_ktransformers_refusals(rq_compile: Command, tmp_path: Path) -> None:
    plan_file = written(tmp_path)
    plan = read_document(Plan, plan_file)
    said = package(rq_compile, plan_file, "ktransformers")
    assert any("give --layers" in remark for remark in said["remarks"])

    def with_loads(load: float | None) -> None:
        slots = [[slot.model_copy(update={"load": load}) for slot in layer.slots] for layer in plan.layers]
        layers = [layer.model_copy(update={"slots": held}) for layer, held in zip(plan.layers, slots, strict=True)]
        write_document(plan.model_copy(update={"layers": layers}), plan_file)

    def tried(*options: object) -> Result:
        return rq_compile("package", plan_file, "--for", "ktransformers", "-o", tmp_path / "x", *options)

    refused(tried("--layers", 3), 2, "has experts in layer 6", "give 7 or more")
    refused(tried("--extra-layers", 1), 2, "--extra-layers has no effect with --for ktransformers")
    with_loads(None)
    refused(tried(), 2, "has no loads for layer 3")
    with_loads(1 / 16)
    refused(tried(), 2, "have the same load")
    assert not (tmp_path / "x").exists()


def test_hybrid_bit_map_has_the_bits_of_every_expert(rq_compile: Command, tmp_path: Path) -> None:
    plan = written(tmp_path, formats="int4", memory=0.5)
    said = package(rq_compile, plan, "hybrid-bit-map")
    content = json.loads((tmp_path / "hybrid-bit-map" / said["files"][0]).read_text())
    assert content == {"hybrid_bit_map": {str(layer): [4] * 16 for layer in range(3, 7)}, "kept_format": "mxfp4_e8m0k32"}
    assert "int4" in said["remarks"][0]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "64 in bf16"),
        ({"formats": "int8", "memory": 0.6}, "64 in int8"),
        ({"policy": "eplb", "memory": 1.25, "target": "batched"}, "16 replicas"),
        ({"policy": "paper"}, "4 replicas"),
    ],
)
def test_a_plan_that_a_hybrid_bit_map_cannot_say_is_refused(rq_compile: Command, tmp_path: Path, how: dict, said: str) -> None:
    result = rq_compile("package", written(tmp_path, **how), "--for", "hybrid-bit-map", "-o", tmp_path / "x")
    refused(result, 2, said)
    assert not (tmp_path / "x").exists()
