"""Experts that tie: calibration, reference and engine choose the same ones, those with the lowest numbers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from calibrated import LENGTH, letters, run
from command_line import Run
from hypothesis import given
from hypothesis import strategies as st
from plans import plan_of, unchanged
from safetensors.numpy import load_file, save_file

from rq_compile.architectures.model import Model
from rq_compile.architectures.ties import _LowestNumber, remarks_on_ties
from rq_compile.calibration import calibrate
from rq_compile.calibration.memory import Way
from rq_compile.evaluation.balance import logical_loads
from rq_compile.export.export import export_graph
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine

TEXT = letters(6 * LENGTH, 3)
# Six experts: not a multiple of the number of elements in a vector register.
SIZES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 6},
    "gpt_oss": {"num_local_experts": 6},
    "deepseek_v2": {"n_routed_experts": 6, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    "deepseek_v3": {"n_routed_experts": 6, "n_group": 3, "topk_group": 2},
    "llama_moe": {},
}


def is_router(name: str) -> bool:
    return bool({"gate", "router"} & set(name.split(".")))


def all_zero(router: np.ndarray) -> np.ndarray:
    return np.zeros_like(router)


def three_equal_rows(router: np.ndarray) -> np.ndarray:
    return router[[0, 1, 2, 1, 4, 1][: len(router)]]


def with_routers(source: Path, target: Path, change: Callable[[np.ndarray], np.ndarray]) -> Model:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    changed = {name: np.ascontiguousarray(change(tensor)) if is_router(name) else tensor for name, tensor in tensors.items()}
    save_file(changed, target / "model.safetensors", metadata={"format": "pt"})
    return Model.open(target)


@pytest.mark.parametrize("family", SIZES)
def test_calibration_reference_and_engine_choose_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if SIZES[family]:
        made = tiny.CONFIGS[family]
        monkeypatch.setitem(tiny.CONFIGS, family, lambda: type(made())(**(made().to_diff_dict() | SIZES[family])))
    model = tiny.build(family, tmp_path / "model")
    exported = export_graph(Model.open(model))
    for change in (all_zero, three_equal_rows):
        checkpoint = with_routers(model, tmp_path / change.__name__, change)
        calibrations = []
        for whole in (True, False):
            monkeypatch.setattr(calibrate, "choose_way", lambda *_, whole=whole, **__: Way(whole, True, "as asked for"))
            calibrations.append(run(checkpoint, {"t": TEXT}))
        output = tmp_path / f"{change.__name__}.onnx"
        plan = plan_of(checkpoint, unchanged)
        compile_engine(checkpoint, plan, output, exported=exported)
        engine = Engine.load(output, threads=1)
        ids = np.array([4 + ord(letter) - 32 for letter in TEXT]).reshape(-1, LENGTH)
        loads = engine.loads(ids)
        for calibration in calibrations:
            for layer, planned in zip(calibration.layers, plan.layers, strict=True):
                assert layer.load == logical_loads(planned, loads[layer.name]).tolist(), change.__name__
        if change is all_zero and family not in ("deepseek_v3", "deepseek_v2"):
            assert calibrations[0].layers[0].load[:3] == [len(TEXT), len(TEXT), 0]
        wanted = Reference.load(checkpoint).logits(ids)
        np.testing.assert_allclose(engine.logits(ids), wanted, atol=1e-4 * np.abs(wanted).max())


@given(
    experts=st.integers(2, 70), groups=st.integers(1, 9), tokens=st.integers(1, 9), bias=st.booleans(), seed=st.integers(0, 99)
)
def test_equal_rows_give_equal_scores_and_the_lowest_numbers(
    experts: int, groups: int, tokens: int, bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, groups, (experts,), generator=generator)
    weight = torch.randn(groups, 24, generator=generator)[rows]
    offset = torch.randn(groups, generator=generator)[rows] if bias else None
    x = torch.randn(tokens, 24, generator=generator)
    with _LowestNumber({experts}):
        scores = torch.nn.functional.linear(x, weight, offset).sigmoid()
        values, chosen = scores.topk(k := min(4, experts), dim=-1)
    expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    np.testing.assert_allclose(scores, expected.sigmoid(), atol=1e-5)
    for row, ids in zip(scores.tolist(), chosen.tolist(), strict=True):
        assert len({(int(group), value) for group, value in zip(rows, row, strict=True)}) == len(set(rows.tolist()))
        assert ids == sorted(range(experts), key=lambda expert: (-row[expert], expert))[:k]
    assert torch.equal(values, scores.gather(1, chosen))


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("olmoe", all_zero, "in 2 of 2 layers (in layer 0, those of experts 0, 1 and 6 more)"),
        ("olmoe", three_equal_rows, "in 2 of 2 layers"),
        ("gpt_oss", three_equal_rows, "in 2 of 2 layers (in layer 0, those of experts 1 and 3)"),
        ("mixtral", three_equal_rows, "in 2 of 2 layers (in layer 0, those of experts 1 and 3)"),
        ("llama_moe", three_equal_rows, "in 2 of 2 layers (in layer 0, those of experts 1 and 3)"),
        ("switch_transformers", three_equal_rows, "in 2 of 2 layers"),
        ("granitemoe", all_zero, "in 2 of 2 layers"),
    ],
)
def test_equal_rows_are_remarked_on(
    family: str, change: Callable, words: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def padded(router: np.ndarray) -> np.ndarray:
        changed = change(router)
        return np.concatenate([changed, router[len(changed) :]])

    checkpoint = with_routers(tiny_checkpoint(family), tmp_path / "m", padded)
    (remark,) = remarks_on_ties(checkpoint)
    assert words in remark
    assert "those with the lowest numbers are chosen" in remark


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_distinct_rows_are_not(family: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Model.open(tiny_checkpoint(family))
    assert remarks_on_ties(checkpoint) == []


def test_a_bias_that_differs_tells_equal_rows_apart(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Ties in DeepSeek-V3, whose bias is added to the scores, and in GPT-OSS."""
    for family in ("deepseek_v3", "gpt_oss"):
        changed = with_routers(tiny_checkpoint(family), tmp_path / family, lambda t: t if t.ndim == 1 else np.zeros_like(t))
        assert remarks_on_ties(changed) == []


def test_the_commands_say_it(model: Path, stages: Path, tmp_path: Path, rq_compile: Run) -> None:
    with_routers(model, tmp_path / "m", all_zero)
    arguments = (tmp_path / "m", "--text", stages / "text.txt", "--sequence-length", 64, "--policy", "none", "-o")
    said = rq_compile("calibrate", *arguments[:5], "-o", tmp_path / "c.json").stderr
    assert said.count("routers have equal rows in 2 of 2 layers") == 1
    assert rq_compile("plan", tmp_path / "c.json", "-o", tmp_path / "p.json").exit_code == 0
    said = rq_compile(tmp_path / "m", "--plan", tmp_path / "p.json", "-o", tmp_path / "e.onnx", "--dry-run").stderr
    assert said.count("routers have equal rows in 2 of 2 layers") == 1
