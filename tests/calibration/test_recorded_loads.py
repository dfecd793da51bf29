"""Loads that servers recorded, written here in the forms that their own recorders write."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import planning_inputs as inputs
import pytest
import torch
from click.testing import Result
from command_line import refused
from safetensors.numpy import save_file

from rq_compile.calibration.recorded_loads import read_loads, with_recorded_loads
from rq_compile.calibration.schema import Calibration

pytestmark = pytest.mark.quick

Command = Callable[..., Result]
LAYERS, EXPERTS, TOP_K = 2, 16, 2
MODEL_LAYERS = inputs.INDEX + LAYERS


@pytest.fixture
def calibration() -> Calibration:
    """Experts in decoder layers 3 and 4; 0 to 2 are dense."""
    return inputs.skewed(LAYERS, EXPERTS, top_k=TOP_K)


@pytest.fixture
def counts() -> np.ndarray:
    """``[steps, layers of the model, m]``, as many tokens in every step and MoE layer; dense layers count nothing."""
    random = np.random.default_rng(7)
    made = np.zeros((5, MODEL_LAYERS, EXPERTS), np.int64)
    for step in made:
        for layer in range(inputs.INDEX, MODEL_LAYERS):
            step[layer] = random.multinomial(200 * TOP_K, random.dirichlet(np.ones(EXPERTS)))
    return made


def sglang(folder: Path, counts: np.ndarray) -> Path:
    path = folder / "expert_distribution.pt"
    torch.save({"rank": 0, "logical_count": torch.from_numpy(counts)}, path)
    return path


def tensorrt_llm(folder: Path, counts: np.ndarray) -> Path:
    """Two ranks share every step's tokens; a rank that saw none in a step has no tensor for it."""
    path = folder / "expert_statistic"
    path.mkdir()
    (path / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K}))
    ranks: list[dict[str, np.ndarray]] = [{}, {}]
    for step, layers in enumerate(counts):
        for layer in range(inputs.INDEX, MODEL_LAYERS):
            part = layers[layer] // 3 if step else np.zeros_like(layers[layer])
            if part.any():
                ranks[0][f"{100 + step}_{layer}"] = part.astype(np.int32)
            ranks[1][f"{100 + step}_{layer}"] = (layers[layer] - part).astype(np.int32)
    for number, tensors in enumerate(ranks):
        save_file(tensors, path / f"rank{number}.safetensors")
    save_file({"100_3": np.ones((4, 2), np.int32)}, path / "rank0_raw.safetensors")
    return path


@pytest.mark.parametrize("write", [sglang, tensorrt_llm])
def test_every_servers_loads_are_those_recorded(
    tmp_path: Path, calibration: Calibration, counts: np.ndarray, write: Callable
) -> None:
    made = with_recorded_loads(calibration, [write(tmp_path, counts)])
    for layer in made.layers:
        assert layer.load == counts[:, layer.index].sum(axis=0).tolist()
        assert layer.text_loads == [layer.load]
        assert layer.batch_loads == counts[:, layer.index].tolist()
        assert layer.tokens == 1000
    assert made.tokens == made.texts[0].tokens == 1000
    assert made.measured_tokens == 0


def test_each_file_is_a_text(tmp_path: Path, calibration: Calibration, counts: np.ndarray) -> None:
    paths = [sglang(tmp_path, counts), tensorrt_llm(tmp_path, counts[:2])]
    made = with_recorded_loads(calibration, paths)
    assert [text.tokens for text in made.texts] == [1000, 400]
    for layer in made.layers:
        of_layer = counts[:, layer.index]
        assert layer.text_loads == [of_layer.sum(axis=0).tolist(), of_layer[:2].sum(axis=0).tolist()]
        assert layer.load == np.sum(layer.text_loads, axis=0).tolist()


def test_the_same_loads_change_no_error(tmp_path: Path, calibration: Calibration) -> None:
    counts = np.zeros((1, MODEL_LAYERS, EXPERTS), np.int64)
    for layer in calibration.layers:
        counts[0, layer.index] = 3 * np.asarray(layer.load)
    made = with_recorded_loads(calibration, [sglang(tmp_path, counts)])
    for before, after in zip(calibration.layers, made.layers, strict=True):
        assert after.error["int4"] == pytest.approx(before.error["int4"])
        assert after.wanda == before.wanda


def test_errors_follow_an_experts_share(tmp_path: Path, calibration: Calibration) -> None:
    layer = calibration.layers[0]
    counts = np.zeros((1, MODEL_LAYERS, EXPERTS), np.int64)
    for each in calibration.layers:
        counts[0, each.index] = each.load
    moved = layer.load[0] // 2
    counts[0, layer.index, 0] -= moved
    counts[0, layer.index, 1] += moved
    after = with_recorded_loads(calibration, [sglang(tmp_path, counts)]).layers[0].error["int8"]
    assert after[0] / layer.error["int8"][0] == pytest.approx((layer.load[0] - moved) / layer.load[0])
    assert after[1] / layer.error["int8"][1] == pytest.approx((layer.load[1] + moved) / layer.load[1])
    assert after[2:] == pytest.approx(layer.error["int8"][2:])


def test_json_of_one_step(tmp_path: Path, counts: np.ndarray) -> None:
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({"logical_count": counts[0].tolist()}))
    assert read_loads(path)[inputs.INDEX].tolist() == [counts[0, inputs.INDEX].tolist()]


def test_from_a_clusters_traffic_to_the_next_plan_and_placement(
    rq_compile: Command, model: Path, stages: Path, out: Path
) -> None:
    old = Calibration.model_validate_json((stages / "calibration.json").read_bytes())
    experts, layers = old.layers[0].geometry.experts, old.layers[-1].index + 1
    loads = np.tile(np.arange(experts)[::-1] + 1, (3, layers, 1)) * 10
    recorded = sglang(out, loads)
    made = out / "traffic.json"
    arguments = ("calibrate", model, "--from-loads", recorded, "--calibration", stages / "calibration.json", "-o", made)
    assert rq_compile(*arguments, "-q").exit_code == 0
    assert "not on these tokens" in " ".join(rq_compile("inspect", made).stdout.split())
    new = Calibration.model_validate_json(made.read_bytes())
    assert new.layers[0].load == loads[:, 0].sum(axis=0).tolist()
    assert new.statistics is not None
    assert old.statistics is not None
    assert (made.parent / new.statistics.name).resolve() == (stages / old.statistics.name).resolve()
    for command in (
        ("plan", made, "--ranks", 2, "-o", out / "plan.json"),
        ("package", out / "plan.json", "--for", "sglang", "-o", out / "placement"),
        (model, "--plan", out / "plan.json", "-o", out / "model.onnx"),
    ):
        result = rq_compile(*command, "-q")
        assert result.exit_code == 0, result.stderr


def test_refusals(rq_compile: Command, model: Path, stages: Path, out: Path, tmp_path: Path, tiny_checkpoint: Callable) -> None:
    calibration = ("--calibration", stages / "calibration.json")
    old = Calibration.model_validate_json((stages / "calibration.json").read_bytes())
    experts, layers = old.layers[0].geometry.experts, old.layers[-1].index + 1
    good = sglang(tmp_path, np.ones((1, layers, experts), np.int64))

    def run(path: Path, *options: object, of: Path = model) -> Result:
        return rq_compile("calibrate", of, "--from-loads", path, *options, "-o", out / "new.json")

    refused(run(good), 2, "--calibration FILE")
    refused(rq_compile("calibrate", model, *calibration, "-o", out / "new.json"), 2, "--from-loads")
    refused(run(good, *calibration, "--text", stages / "text.txt"), 2, "--text has no effect")
    refused(run(good, *calibration, "--sequence-length", 64), 2, "--sequence-length has no effect")
    refused(run(good, *calibration, of=tiny_checkpoint("mixtral")), 2, "give a calibration of this MODEL")
    refused(run(tmp_path / "no.pt", *calibration), 2, "no.pt", "No such file")
    refused(run(tmp_path, *calibration), 2, "does not hold recorded loads")
    (tmp_path / "torn.pt").write_bytes(good.read_bytes()[:100])
    refused(run(tmp_path / "torn.pt", *calibration), 2, "torn.pt", "does not hold recorded loads")
    torch.save({"logical_count": Path("harm")}, tmp_path / "object.pt")
    refused(run(tmp_path / "object.pt", *calibration), 2, "does not hold recorded loads")
    refused(run(good, *calibration, "--from-loads", good), 2, "two --from-loads are named", good.name)
    torch.save({"logical_count": torch.ones(1, layers, experts, dtype=torch.bfloat16)}, tmp_path / "bf16.pt")
    refused(run(tmp_path / "bf16.pt", *calibration), 2, "does not hold recorded loads")
    for name, table, word in (
        ("deeper", np.ones((1, layers + 1, experts)), f"counts tokens in layer {layers}, where MODEL has no experts"),
        ("experts", np.ones((1, layers, experts + 1)), f"counts {experts + 1} experts"),
        ("layers", np.ones((1, layers - 1, experts)), f"experts in layer {layers - 1}"),
        ("idle", np.zeros((1, layers, experts)), "counts no token"),
        ("negative", -np.ones((1, layers, experts)), "negative"),
        ("halves", np.ones((1, layers, experts)) / 2, "not a whole number"),
        ("nan", np.full((1, layers, experts), np.nan), "not a whole number"),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"logical_count": table.tolist()}))
        refused(run(path, *calibration), 2, path.name, word)
    assert not list(out.iterdir())
