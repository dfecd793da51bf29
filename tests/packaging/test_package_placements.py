"""Placements for serving systems, read back with the indexing of those systems' own readers."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import planning_inputs as inputs
import pytest
import yaml
from calibrated import copied
from click.testing import Result
from command_line import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_compile.files import write_document
from rq_compile.packaging.placements import placement_of
from rq_compile.planning.plan import make_plan
from rq_compile.planning.schema import Plan, Slot

Command = Callable[..., Result]
SERVERS = ("tensorrt-llm", "sglang", "vllm", "vllm-ascend")


def plan_of(policy: str = "eplb", memory: float = 1.25, ranks: int = 4, **sizes: int) -> Plan:
    return make_plan(inputs.skewed(**sizes), policy=policy, memory=memory, ranks=ranks, target="cuda")


def with_slots(plan: Plan, *slots: list[tuple[int, int]]) -> Plan:
    """The plan with layers of these (expert, rank), all with the same load."""
    layers = [
        layer.model_copy(update={"slots": [Slot(expert=e, rank=r, format="bf16", load=1 / len(held)) for e, r in held]})
        for layer, held in zip(plan.layers, slots, strict=True)
    ]
    return plan.model_copy(update={"layers": layers})


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """Four layers, the first of them decoder layer 3: three dense ones come before."""
    path = tmp_path / "plan.json"
    write_document(plan_of(), path)
    return path


def placed(plan_file: Path) -> dict[int, list[list[int]]]:
    """Decoder layer -> rank -> its experts, computed only from the plan."""
    plan = Plan.model_validate_json(plan_file.read_bytes())
    return {
        layer.index: [sorted(slot.expert for slot in layer.slots if slot.rank == rank) for rank in range(plan.ranks)]
        for layer in plan.layers
    }


def package(rq_compile: Command, plan_file: Path, server: str, *options: object) -> tuple[Path, dict]:
    folder = plan_file.parent / server
    result = rq_compile("package", plan_file, "--for", server, "-o", folder, "--json", *options)
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert sorted(said["files"]) == sorted(path.name for path in folder.iterdir())
    return folder, said


def test_tensorrt_llm_counts_dense_layers_and_gives_ranks_consecutive_blocks(rq_compile: Command, plan_file: Path) -> None:
    folder, said = package(rq_compile, plan_file, "tensorrt-llm")
    options = yaml.safe_load((folder / "llm_api_options.yaml").read_text())
    assert said["run"][0].startswith(f"cd {folder} && ")
    balancer = yaml.safe_load((folder / options["moe_config"]["load_balancer"]).read_text())
    assert set(balancer) == {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert balancer["num_slots"] == 20
    assert balancer["layer_updates_per_iter"] == 0
    blocks = {
        layer: [held[rank * 5 : rank * 5 + 5] for rank in range(4)]
        for layer, held in balancer["initial_global_assignments"].items()
    }
    assert blocks == placed(plan_file)
    assert min(blocks) == inputs.INDEX
    assert "--ep_size 4" in said["run"][0]


def test_sglang_has_a_row_for_every_decoder_layer(rq_compile: Command, plan_file: Path) -> None:
    folder, said = package(rq_compile, plan_file, "sglang", "--layers", 9)
    content = json.loads((folder / "expert_location.json").read_text())
    assert set(content) == {"physical_to_logical_map"}
    rows = np.array(content["physical_to_logical_map"])
    assert rows.shape == (9, 20)
    for layer, ranks in placed(plan_file).items():
        assert rows[layer].reshape(4, 5).tolist() == ranks
    assert set(rows[0]) == set(range(16))
    assert "--ep-num-redundant-experts 4 " in said["run"][0]


def test_sglang_rows_end_with_the_last_moe_layer_and_say_so(rq_compile: Command, plan_file: Path) -> None:
    folder, said = package(rq_compile, plan_file, "sglang")
    assert len(json.loads((folder / "expert_location.json").read_text())["physical_to_logical_map"]) == 7
    assert any("give --layers" in remark for remark in said["remarks"])


def test_vllm_leaves_dense_layers_out(rq_compile: Command, plan_file: Path) -> None:
    folder, said = package(rq_compile, plan_file, "vllm")
    rows = json.loads((folder / "physical_to_logical_map.json").read_text())
    assert [np.reshape(row, (4, 5)).tolist() for row in rows] == list(placed(plan_file).values())
    assert any("does not read placement files yet" in remark for remark in said["remarks"])


def test_vllm_ascend_counts_moe_layers(rq_compile: Command, plan_file: Path) -> None:
    folder, said = package(rq_compile, plan_file, "vllm-ascend")
    content = json.loads((folder / "expert_map.json").read_text())
    assert content["moe_layer_count"] == 4
    assert [layer["layer_id"] for layer in content["layer_list"]] == [0, 1, 2, 3]
    for layer, ranks in zip(content["layer_list"], placed(plan_file).values(), strict=True):
        assert layer["device_count"] == 4
        assert [device["device_expert"] for device in layer["device_list"]] == ranks
    assert str(folder / "expert_map.json") in said["run"][0]
    assert any("only with its Model Runner V1" in remark for remark in said["remarks"])


def rows_of(server: str, folder: Path) -> list[list[int]]:
    """The slots of every layer that the file has a row for, in order."""
    if server == "tensorrt-llm":
        assignments = yaml.safe_load((folder / "moe_load_balancer.yaml").read_text())["initial_global_assignments"]
        assert list(assignments) == list(range(min(assignments), max(assignments) + 1))
        return list(assignments.values())
    if server == "vllm-ascend":
        content = json.loads((folder / "expert_map.json").read_text())
        assert content["moe_layer_count"] == len(content["layer_list"])
        return [
            [expert for device in layer["device_list"] for expert in device["device_expert"]] for layer in content["layer_list"]
        ]
    content = json.loads(next(folder.glob("*.json")).read_text())
    return content["physical_to_logical_map"] if server == "sglang" else content


@pytest.mark.parametrize("server", SERVERS)
def test_layers_that_predict_further_tokens(rq_compile: Command, plan_file: Path, tmp_path: Path, server: str) -> None:
    plan = Plan.model_validate_json(plan_file.read_bytes())
    write_document(plan.model_copy(update={"extra_layers": 2}), plan_file)
    folder, said = package(rq_compile, plan_file, server)
    assert any("give --extra-layers 2 to add their rows" in remark for remark in said["remarks"])
    before = rows_of(server, folder)
    folder.rename(tmp_path / "before")
    folder, said = package(rq_compile, plan_file, server, "--extra-layers", 2)
    assert not any("give --extra-layers" in remark for remark in said["remarks"])
    assert any("rows of 2 multi-token-prediction layers from 7 on" in remark for remark in said["remarks"])
    after = rows_of(server, folder)
    assert after[:-2] == before
    experts = plan.layers[0].geometry.experts
    for row in after[-2:]:
        assert len(row) == len(before[-1])
        assert set(row) == set(range(experts))
        ranks = np.array(row).reshape(plan.ranks, -1)
        assert all(len(set(rank)) == len(rank) for rank in ranks.tolist())


def test_sglang_puts_further_layers_behind_dense_ones(rq_compile: Command, plan_file: Path) -> None:
    folder, _ = package(rq_compile, plan_file, "sglang", "--layers", 9, "--extra-layers", 1)
    rows = rows_of("sglang", folder)
    assert len(rows) == 10
    assert rows[9] != rows[8]


def test_a_model_without_further_layers_gets_no_remark(rq_compile: Command, plan_file: Path) -> None:
    _, said = package(rq_compile, plan_file, "vllm")
    assert not any("multi-token-prediction" in remark for remark in said["remarks"])


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_a_plan_knows_the_models_further_layers(
    rq_compile: Command, tiny_checkpoint: Callable[[str], Path], stages: Path, tmp_path: Path, key: str
) -> None:
    copied(tiny_checkpoint("deepseek_v3"), tmp_path / "m", **{key: 1})
    text = ("--text", stages / "text.txt", "--sequence-length", 64)
    assert rq_compile("calibrate", tmp_path / "m", *text, "-o", tmp_path / "c.json").exit_code == 0
    assert rq_compile("plan", tmp_path / "c.json", "--ranks", 2, "--policy", "place", "-o", tmp_path / "p.json").exit_code == 0
    result = rq_compile(
        "package", tmp_path / "p.json", "--for", "tensorrt-llm", "-o", tmp_path / "d", "--extra-layers", 1, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert len(rows_of("tensorrt-llm", tmp_path / "d")) == 3
    assert "multi-token-prediction layers from 3 on" in result.stdout


def test_places_that_are_left_get_the_copies_that_relieve_most() -> None:
    plan = plan_of("none", memory=1.0, ranks=2, layers=1, experts=4)
    slots = [Slot(expert=e, rank=r, format="bf16", load=load) for e, r, load in
             [(0, 0, 0.1), (1, 0, 0.2), (3, 0, 0.1), (2, 1, 0.6)]]  # fmt: skip
    placement = placement_of(plan.model_copy(update={"layers": [plan.layers[0].model_copy(update={"slots": slots})]}))
    # Rank 1 has room for two: 1 is the busiest it lacks, and then 0 before 3.
    assert placement.experts[0].tolist() == [[0, 1, 3], [0, 1, 2]]
    assert "2 in 1 layers" in placement.remarks[-1]
    assert "6 slots for 4 experts take 1.50 times" in placement.remarks[-2]


def test_the_least_busy_rank_is_relieved_first() -> None:
    plan = plan_of("none", memory=1.0, ranks=3, layers=1, experts=4)
    slots = [Slot(expert=e, rank=r, format="bf16", load=load) for e, r, load in
             [(0, 0, 0.4), (1, 0, 0.0), (2, 1, 0.35), (3, 2, 0.25)]]  # fmt: skip
    placement = placement_of(plan.model_copy(update={"layers": [plan.layers[0].model_copy(update={"slots": slots})]}))
    # Expert 0 goes to rank 2, the less busy of the two with room; then 3 (0.25) is the busiest that rank 1 lacks.
    assert placement.experts[0].tolist() == [[0, 1], [2, 3], [0, 3]]


def test_what_is_lost_is_said() -> None:
    plan = plan_of("optimal", memory=0.6, ranks=2, layers=2)
    quantized = sum(slot.format in ("int8", "int4") for layer in plan.layers for slot in layer.slots)
    placement = placement_of(plan)
    said = next(remark for remark in placement.remarks if "no formats" in remark)
    assert sum(int(word) for word in said.replace(",", "").split() if word.isdigit()) == quantized
    memory = placement.slots / placement.experts_of_model
    assert memory > 1
    assert any(f"{memory:.2f} times the experts' memory" in remark for remark in placement.remarks)


def test_unknown_loads_are_said_to_be_taken_as_equal() -> None:
    plan = plan_of(layers=2)
    slots = [slot.model_copy(update={"load": None}) for slot in plan.layers[1].slots]
    placement = placement_of(
        plan.model_copy(update={"layers": [plan.layers[0], plan.layers[1].model_copy(update={"slots": slots})]})
    )
    assert any(f"no loads for layers {inputs.INDEX + 1}:" in remark for remark in placement.remarks)
    assert not any("no loads" in remark for remark in placement_of(plan).remarks)


def test_command_lines_are_quoted(rq_compile: Command, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_document(plan_of(layers=1).model_copy(update={"model": "my model"}), path)
    for server in SERVERS:
        folder = tmp_path / f"for {server}"
        said = json.loads(rq_compile("package", path, "--for", server, "-o", folder, "--json").stdout)
        words = shlex.split(said["run"][0])
        assert "my model" in words
        assert server == "vllm" or any(str(folder) in word for word in words)


def test_balance_is_reported_as_the_plan_predicts_it() -> None:
    plan = plan_of()
    after = np.mean([layer.predicted.rank_imbalance_after for layer in plan.layers])
    before = np.mean([layer.predicted.rank_imbalance_before for layer in plan.layers])
    assert f"{before:.3f} with experts in consecutive blocks, {after:.3f} as planned" in placement_of(plan).remarks[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_rank_has_as_many_different_experts_in_every_layer(data: st.DataObject) -> None:
    ranks, experts = data.draw(st.integers(2, 5)), data.draw(st.integers(2, 12))
    plan = plan_of("none", memory=1.0, ranks=ranks, layers=2, experts=experts)
    layers = []
    for _ in plan.layers:
        extra = data.draw(st.lists(st.tuples(st.integers(0, experts - 1), st.integers(0, ranks - 1)), max_size=8))
        layers.append([(e, data.draw(st.integers(0, ranks - 1))) for e in range(experts)] + extra)
    placement = placement_of(with_slots(plan, *layers))
    for held, made in zip(layers, placement.experts, strict=True):
        assert all(len(set(rank)) == len(rank) for rank in made.tolist())
        for expert, rank in held:
            assert expert in made[rank]
    widest = max(len({e for e, r in held if r == rank}) for held in layers for rank in range(ranks))
    assert placement.experts.shape == (2, ranks, widest)


def test_an_engine_is_placed_as_the_plan_it_was_compiled_with(rq_compile: Command, model: Path, stages: Path, out: Path) -> None:
    plan = out / "plan.json"
    assert rq_compile("plan", stages / "calibration.json", "--ranks", 2, "-o", plan, "-q").exit_code == 0
    assert rq_compile(model, "--plan", plan, "-o", out / "model.onnx", "-q").exit_code == 0
    for source, folder in ((plan, out / "from-plan"), (out / "model.onnx", out / "from-engine")):
        assert rq_compile("package", source, "--for", "vllm", "-o", folder, "-q").exit_code == 0
    name = "physical_to_logical_map.json"
    assert (out / "from-plan" / name).read_bytes() == (out / "from-engine" / name).read_bytes()


@pytest.mark.parametrize("server", SERVERS)
def test_a_plan_for_one_rank_is_refused(rq_compile: Command, stages: Path, out: Path, server: str) -> None:
    result = rq_compile("package", stages / "plan.json", "--for", server, "-o", out / "x")
    refused(result, 2, "plan.json is for one rank", "--ranks")
    assert not list(out.iterdir())


def test_refusals(rq_compile: Command, plan_file: Path, stages: Path, out: Path) -> None:
    refused(rq_compile("package", stages / "calibration.json", "--for", "vllm", "-o", out / "x"), 2, "not a plan")
    refused(rq_compile("package", out / "no.json", "--for", "vllm", "-o", out / "x"), 2, "no.json")
    refused(rq_compile("package", plan_file, "--for", "vllm", "--layers", 9, "-o", out / "x"), 2, "--layers has no effect")
    refused(rq_compile("package", plan_file, "--for", "sglang", "--layers", 3, "-o", out / "x"), 2, "layer 6", "give 7 or more")
    (out / "full").mkdir()
    (out / "full" / "file").touch()
    refused(rq_compile("package", plan_file, "--for", "vllm", "-o", out / "full"), 2, "not an empty folder")
