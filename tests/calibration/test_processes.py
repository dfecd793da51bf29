"""Several processes share a calibration or a compilation, with the result of one; one that dies ends them all with a sentence."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import PACKAGED_IN, run_command
from safetensors.numpy import load_file

from rq_compile.processes import World, speaker

# Layer by layer, as several processes run, and dying before the layer number $DIE_AT, or the piece number $DIE_AT_PIECE that the
# first process asked for, where these are set.
PROGRAM = """
import os, signal, sys
from rq_compile.calibration import calibrate as module
from rq_compile.cli.main import run
from datetime import timedelta
from rq_compile import processes
from rq_compile.targets import shared_pieces
measure_layer, choose_way, measured = module.measure_layer, module.choose_way, []
processes.MEETING = timedelta(seconds=float(os.environ.get("MEETING", 300)))
def measure(*arguments, **given):
    if os.environ.get("DIE_AT") == str(len(measured)) and os.environ.get("RANK") == os.environ.get("DYING"):
        os.kill(os.getpid(), signal.SIGKILL)
    measured.append(1)
    return measure_layer(*arguments, **given)
module.measure_layer = measure
compute, computed = shared_pieces.compute, []
def die(piece):
    computed.append(1)
    if os.environ.get("DIE_AT_PIECE") == str(len(computed)):
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(piece)
shared_pieces.compute = die
if "RANK" not in os.environ:
    module.choose_way = lambda *_, **__: module.Way(False, True, "layer by layer")
sys.argv[0] = "rq-compile"
run()
"""
TEXT = "In the beginning was the word, and the word was with the reader; nothing was made without it. " * 20


def start(size: int, *arguments: object, **variables: str) -> list[subprocess.Popen[str]]:
    """The processes of one command, as Slurm and torchrun start them: they know about each other only from these variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    worlds = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(size)] if size > 1 else [{}]
    common = os.environ | {"PYTHONPATH": str(PACKAGED_IN), "OMP_NUM_THREADS": "1"} | variables
    return [
        subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, *map(str, arguments)],
            env=common | {name: str(value) for name, value in world.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for world in worlds
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each."""
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *both) for process, both in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def model() -> Path:
    return Path(__file__).parents[2] / "samples" / "olmoe"


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a calibration, a plan and an engine that single processes wrote."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "text.txt").write_text(TEXT)
    for arguments in (calibrating(model, folder, "calibration.json"), planning(folder), compiling(model, folder, "alone.onnx")):
        (status, _, error), *_ = ended(start(1, *arguments))
        assert status == 0, error
    return folder


def calibrating(model: Path, folder: Path, name: str) -> list[object]:
    lengths = ("--sequence-length", 64, "--batch-size", 2, "--formats", "int8,int4,constant")
    return ["calibrate", model, "--text", folder / "text.txt", "-o", folder / name, *lengths]


def planning(folder: Path) -> list[object]:
    return ["plan", folder / "calibration.json", "--memory", "0.6", "-o", folder / "plan.json"]


def compiling(model: Path, folder: Path, name: str) -> list[object]:
    return [model, "--plan", folder / "plan.json", "-o", folder / name]


def same(one: Path, other: Path) -> None:
    """Counts are equal exactly, measurements up to fp32 rounding."""
    first, second = (json.loads(path.read_text()) for path in (one, other))
    for one_module, another in zip(first["dense"], second["dense"], strict=True):
        assert (another["name"], another["matrices"]) == (one_module["name"], one_module["matrices"])
        assert another["square"] == pytest.approx(one_module["square"], rel=1e-5)
        assert another["error"] == pytest.approx(one_module["error"], rel=2e-2, abs=1e-7 * one_module["square"])
    for layer, found in zip(first["layers"], second["layers"], strict=True):
        for name in ("load", "text_loads", "batch_loads", "dropped", "estimated"):
            assert found[name] == layer[name], name
        np.testing.assert_allclose(found["wanda"], layer["wanda"], rtol=1e-5)
        for format, errors in layer["error"].items():
            np.testing.assert_allclose(found["error"][format], errors, rtol=1e-4, err_msg=format)
    moments, others = (load_file(path.with_suffix(".safetensors")) for path in (one, other))
    assert moments.keys() == others.keys()
    for name, moment in moments.items():
        np.testing.assert_allclose(others[name], moment, rtol=0, atol=1e-6 * np.abs(moment).max())


def test_three_processes_calibrate_as_one(model: Path, alone: Path) -> None:
    """Unequal shares: the numbers of batches and experts are not divisible by three."""
    first, *others = ended(start(3, *calibrating(model, alone, "three.json")))
    assert first[0] == 0, first
    assert "3 processes share its batches and experts" in first[2]
    assert others == [(0, "", "")] * 2
    same(alone / "calibration.json", alone / "three.json")


@pytest.mark.parametrize("sample", ["deepseek-v2", "qwen2-moe"])
def test_two_processes_calibrate_shared_experts_as_one(sample: str, tmp_path: Path) -> None:
    """Layer by layer, the routed experts beside them have no values while they run again."""
    model = Path(__file__).parents[2] / "samples" / sample
    (tmp_path / "text.txt").write_text(TEXT)
    for size in (1, 2):
        for status, _, error in ended(start(size, *calibrating(model, tmp_path, f"{size}.json"))):
            assert status == 0, error
    assert "shared experts" in {module["kind"] for module in json.loads((tmp_path / "1.json").read_text())["dense"]}
    same(tmp_path / "1.json", tmp_path / "2.json")


@pytest.mark.parametrize("dying", [0, 1])
def test_a_lost_process_ends_all_and_the_run_goes_on_later(model: Path, alone: Path, dying: int) -> None:
    command = calibrating(model, alone, f"resumed{dying}.json")
    results = ended(start(2, *command, DIE_AT="2", DYING=str(dying)))
    status, output, error = results[1 - dying]
    assert results[dying][0] == -signal.SIGKILL
    assert (status, output) == (1, "")
    assert "Traceback" not in error
    assert error.count("error: ") == 1
    assert "one of the 2 processes ended" in error
    assert not (alone / f"resumed{dying}.json").exists()
    # With a different number of processes.
    ((status, _, error),) = ended(start(1, *command))
    assert status == 0, error
    assert "continuing after model.layers.1.mlp.experts" in error
    same(alone / "calibration.json", alone / f"resumed{dying}.json")


def test_two_processes_compile_the_same_bytes(model: Path, alone: Path) -> None:
    first, other = ended(start(2, *compiling(model, alone, "two.onnx")))
    assert first[0] == 0, first
    assert other == (0, "", "")
    assert (alone / "two.onnx.data").read_bytes() == (alone / "alone.onnx.data").read_bytes()
    one, two = (json.loads((alone / f"{name}.json").read_text()) for name in ("alone", "two"))
    assert two["weights"]["sha256"] == one["weights"]["sha256"]
    assert two["plan"] == one["plan"]


def test_a_lost_process_ends_a_compilation(model: Path, alone: Path) -> None:
    """It dies while the first process exports the graph."""
    (status, output, error), other = ended(start(2, *compiling(model, alone, "lost.onnx"), DIE_AT_PIECE="20"))
    assert other[0] == -signal.SIGKILL
    assert (status, output) == (1, "")
    assert "Traceback" not in error
    assert error.count("error: one of the 2 processes ended") == 1
    assert not [path for path in alone.iterdir() if "lost" in path.name]


def test_a_mistake_is_told_once(model: Path, alone: Path) -> None:
    first, other = ended(start(2, *calibrating(model, alone, "wrong.json"), "--sequence-length", 100_000))
    assert first[0] == other[0] == 2
    assert first[2].count("error: ") == 1
    assert other[1:] == ("", "")


def test_a_process_that_never_comes_is_not_waited_for_for_long(model: Path, alone: Path) -> None:
    processes = start(2, *calibrating(model, alone, "waiting.json"), MEETING="3")
    processes[1].kill()
    first, _ = ended(processes)
    assert first[0] == 1
    assert first[2].count("error: ") == 1
    assert "error: the 2 processes of WORLD_SIZE did not meet within 3 s: " in first[2]
    assert "Traceback" not in first[2]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', but must be a number from 1 to"),
        ("WORLD_SIZE", "", "WORLD_SIZE is ''"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0'"),
        ("RANK", "first", "RANK is 'first', but must be a number from 0 to 1;"),
        ("RANK", "2", "RANK is '2'"),
        ("RANK", "-1", "RANK is '-1'"),
        ("LOCAL_WORLD_SIZE", "1(x2)", "LOCAL_WORLD_SIZE is '1(x2)', but must be a number from 1 to 2"),
    ],
)
def test_refuses_an_environment_that_makes_no_sense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, said: str
) -> None:
    for variable, given in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2", name: value}.items():
        monkeypatch.setenv(variable, given)
    result = run_command("inspect", tmp_path)
    assert result.exit_code == 2
    assert f"error: the environment variable {said}" in result.stderr
    assert result.stderr.rstrip().endswith("unset WORLD_SIZE, or start the processes with torchrun")


@pytest.mark.parametrize(("local", "said"), [("1", None), (None, None), ("0", "process 1: "), ("x", "")])
def test_the_first_of_a_host_tells_what_is_wrong_there(monkeypatch: pytest.MonkeyPatch, local: str | None, said: str) -> None:
    for variable, given in {"WORLD_SIZE": "2", "RANK": "1", **({"LOCAL_RANK": local} if local else {})}.items():
        monkeypatch.setenv(variable, given)
    assert speaker() == said


def test_an_engine_for_tensorrt_is_compiled_by_one(model: Path, alone: Path) -> None:
    first, other = ended(start(2, *compiling(model, alone, "two.plan"), "--no-build"))
    assert first[0] == other[0] == 2
    assert "error: 2 processes cannot share the compilation of" in first[2]
    assert "start it without torchrun" in first[2]
    assert other[1:] == ("", "")
    assert not list(alone.glob("two.plan*"))


def test_torchrun_starts_them_and_ends_them(model: Path, alone: Path) -> None:
    """As soon as one process fails, its agent kills the others."""
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(PACKAGED_IN), "OMP_NUM_THREADS": "1", "DIE_AT": "1", "DYING": "1"}
    program = alone / "program.py"
    program.write_text(PROGRAM)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(program)]
    command = [sys.executable, "-P", *torchrun, *map(str, calibrating(model, alone, "torchrun.json"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.count("error: one of the 2 processes ended") == 1
    assert time.monotonic() - began < 100


@pytest.mark.parametrize(
    ("size", "costs", "owners"),
    [(1, [1, 2], [0, 0]), (2, [1, 1, 1], [1, 0, 1]), (2, [5, 1, 1, 1], [1, 0, 0, 0]), (3, [2, 1], [2, 1]), (3, [], [])],
)
def test_each_item_goes_to_who_has_least_to_do(size: int, costs: list[float], owners: list[int]) -> None:
    world = World.__new__(World)
    world.size = size
    assert world.owners(costs) == owners


def test_who_has_time_takes_the_next_item(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    worlds = [World.__new__(World) for _ in range(2)]
    for rank, world in enumerate(worlds):
        world.rank, world.size, world._lists, world._place = rank, 2, 0, store
    busy, idle = (world.taken(5) for world in worlds)
    assert next(busy) == 0
    others = [next(idle), next(idle), next(idle)]
    assert others == [1, 2, 3]
    assert list(busy) == [4]
    assert list(idle) == []
    monkeypatch.setattr(World, "all", lambda *_: iter([[4, 0], others]))
    assert worlds[0].takers([4, 0]) == [0, 1, 1, 1, 0]
    assert [list(world.taken(2)) for world in worlds] == [[0, 1], []]  # of the next list


def test_one_process_owns_all_and_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: Any) -> None:
        raise AssertionError("a world of one has nobody to talk to")

    for name in ("init_process_group", "all_reduce", "broadcast_object_list", "send_object_list"):
        monkeypatch.setattr(torch.distributed, name, none)
    world = World()
    items = ["a", "b"]
    owners = world.owners([1, 1])
    seen: list[Callable[..., Any]] = [world.own, world.all, world.at_first]
    assert [list(each(owners, items)) for each in seen] == [items] * 3
    assert list(world.taken(2)) == [0, 1]
    assert world.takers([1, 0]) == [0, 0]
    assert world.from_first(3) == 3
    assert world.sum(np.ones(2)).tolist() == [1, 1]
