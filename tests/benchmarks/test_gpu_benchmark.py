"""The parts of benchmarks/gpu_moe_layer.py that do not need a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu_moe_layer as benchmark

SMALL = benchmark.Shape("small", 256, 128, 8, 2)


def test_no_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, benchmark.__file__, "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "torch finds no GPU here; run this on a machine with one" in result.stderr


@pytest.mark.parametrize("kind", benchmark.ROUTINGS)
def test_routing_takes_different_experts_and_skew_is_skewed(kind: str) -> None:
    ids = benchmark.routing(SMALL, 4000, kind, seed=3)
    assert ids.shape == (4000, 2)
    assert (ids[:, 0] != ids[:, 1]).all()
    loads = ids.reshape(-1).bincount(minlength=8).double()
    assert (loads[0] / loads[-1] > 3) == (kind == "skewed")
    assert torch.equal(ids, benchmark.routing(SMALL, 4000, kind, seed=3))


def test_work_counts_touched_experts_once() -> None:
    ids = torch.tensor([[0, 1], [0, 3]])
    touched, macs = benchmark.work(SMALL, [0, 1, 2, 2, 0, 0, 0, 0], ids)
    matrix = 3 * 256 * 128
    assert touched == pytest.approx(matrix * (2 + 1.03125 + 0.53125))
    assert macs == 4 * matrix


def test_only_the_best_tile_of_the_baseline_is_shown() -> None:
    times = {"rq.moe": 1.0, "fused MoE (16,)": 3.0, "fused MoE (64,)": 2.0, "torch grouped_mm": 5.0}
    assert list(benchmark.best_tile(times)) == ["rq.moe", "fused MoE (64,)", "torch grouped_mm"]
    assert benchmark.best_tile({"rq.moe": 1.0}) == {"rq.moe": 1.0}
