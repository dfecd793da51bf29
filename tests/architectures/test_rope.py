"""Rotary embeddings that are scaled, and those that depend on the length, compared with transformers on the same folder."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from command_line import Run
from plans import plan_of, unchanged
from transformers import AutoModelForCausalLM, PreTrainedModel

from rq_compile.architectures.model import Model
from rq_compile.errors import UserError
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.standalone.decoding import decode
from rq_compile.targets.onnxruntime import compile_engine

TRAINED, LONGEST = 16, 32
LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": TRAINED,
}
PHIMOE = {**LONG, "short_mscale": 1.2, "long_mscale": 1.5}  # as microsoft/Phi-3.5-MoE-instruct has it
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": TRAINED}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def build(family: str, folder: Path, rope: dict[str, Any], key: str = "rope_scaling", **more: Any) -> Model:
    tiny.build(family, folder)
    file = folder / "config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if not name.startswith("rope_")}
    length = {"max_position_embeddings": LONGEST, "rope_theta": 10000.0}
    file.write_text(json.dumps({**config, **length, key: rope, **more}))
    return Model.open(folder)


def fresh(model: Model) -> PreTrainedModel:
    """Computed by a new transformers model, which has not run any sequence yet."""
    return AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()


def engine_of(model: Model) -> Engine:
    output = model.path / "engine.onnx"
    compile_engine(model, plan_of(model, unchanged), output)
    return Engine.load(output, threads=1)


def ids_of(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(4, tiny.VOCABULARY, (2, length))


@pytest.mark.parametrize(
    ("family", "rope", "more"),
    [
        ("phimoe", PHIMOE, {}),
        ("mixtral", LONG, {"head_dim": 8}),
        ("mixtral", {"type": "dynamic", "factor": 4.0}, {"head_dim": 8}),
        ("deepseek_v2", {"rope_type": "dynamic", "factor": 3.0}, {}),
    ],
)
def test_an_engine_is_transformers_at_every_length(
    family: str, rope: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    model = build(family, tmp_path / "m", rope, **more)
    engine = engine_of(model)
    for length in (5, TRAINED, TRAINED + 1, LONGEST, LONGEST + 1, 50):
        wanted = Reference(fresh(model)).logits(ids := ids_of(length))
        np.testing.assert_allclose(engine.logits(ids), wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=str(length))
    for prompt in (TRAINED - 6, TRAINED, TRAINED + 1, LONGEST - 3):
        prompt_ids = torch.from_numpy(ids_of(prompt)[:1])
        generating: Any = fresh(model)
        generated = generating.generate(prompt_ids, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=2)
        expected = generated[0, prompt:].tolist()
        assert list(engine.generate(prompt_ids[0].tolist(), 10, stop=False)) == expected, prompt
        assert list(Reference(fresh(model)).generate(prompt_ids[0].tolist(), 10, stop=False)) == expected, prompt
        manifest = json.loads((model.path / "engine.json").read_text())  # as a package reads it
        assert list(islice(decode(engine._session, manifest, prompt_ids[0].tolist()), 10)) == expected, prompt


@pytest.mark.parametrize("family", ["deepseek", "llama_moe"])
def test_families_of_remote_code_scale_linearly(family: str, tmp_path: Path) -> None:
    """All frequencies are a quarter of those without scaling, in both spellings of the setting."""
    linear = {"factor": 4}
    spellings = [
        build(family, tmp_path / key / name, {name: "linear", **linear}, key=key)
        for key in ("rope_scaling", "rope_parameters")
        for name in ("type", "rope_type")
    ]
    plain = Reference.load(build(family, tmp_path / "plain", {}))
    ids = ids_of(20)
    before = plain.logits(ids)
    plain.model.model.rotary_emb.inv_freq /= 4
    wanted = plain.logits(ids)
    for model in spellings:
        found = Reference.load(model).logits(ids)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(engine_of(spellings[0]).logits(ids), wanted, atol=2e-5 * np.abs(wanted).max())
    assert np.abs(before - wanted).max() > 0.01


def test_dynamic_scaling_of_remote_code_is_that_of_mixtral(tmp_path: Path) -> None:
    dynamic = {"type": "dynamic", "factor": 4.0}
    ours = build("llama_moe", tmp_path / "m", dynamic).without_weights.model.rotary_emb
    wanted = build("mixtral", tmp_path / "x", dynamic, head_dim=8).without_weights.model.rotary_emb
    position = torch.arange(40)[None]
    for mine, theirs in zip(ours(torch.zeros(1), position), wanted(torch.zeros(1), position), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("family", "rope"), [("mixtral", LLAMA3), ("qwen3_moe", YARN), ("deepseek_v3", YARN), ("olmoe", LLAMA3)])
def test_static_scaling_is_that_of_transformers(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    """Without a ``head_dim``, with which transformers cannot run Mixtral."""
    ours = build(family, tmp_path / "m", rope).without_weights.model.rotary_emb
    more: dict[str, Any] = {"head_dim": 8} if family == "mixtral" else {}
    theirs = fresh(build(family, tmp_path / "x", rope, **more)).model.rotary_emb
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    assert ours.attention_scaling == theirs.attention_scaling


@pytest.mark.parametrize(
    ("family", "rope", "words"),
    [
        ("deepseek", {"type": "yarn", "factor": 2.0}, ["deepseek with rope_scaling of type yarn", "linear"]),
        ("llama_moe", {"rope_type": "llama3", **LLAMA3}, ["llama_moe with rope_scaling of type llama3"]),
        ("mixtral", {"type": "su", "factor": 2.0}, ["rope_type su (rope_scaling)", "longrope"]),
        ("mixtral", {"type": "linear"}, ["rope_type linear (rope_scaling) with factor None"]),
        ("mixtral", {"type": "dynamic", "factor": "4"}, ["rope_type dynamic (rope_scaling) with factor '4'"]),
        ("olmoe", {"type": "linear", "factor": 0}, ["rope_type linear (rope_scaling) with factor 0"]),
        ("mixtral", {**LONG, "long_factor": [1.0, "x"]}, ["rope_type longrope (rope_scaling) with long_factor [1.0, 'x']"]),
        (
            "phimoe",
            {"type": "linear", "factor": 2.0},
            ["rope_type linear (rope_scaling) without original_max_position_embeddings"],
        ),
        (
            "gpt_oss",
            {"full_attention": {"type": "dynamic", "factor": 2.0}},
            ["rope_type dynamic (rope_scaling) in some layers only"],
        ),
        ("mixtral", 5, ["rope_scaling 5, which is not an object"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(family: str, rope: Any, words: list[str], tmp_path: Path) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(UserError) as refusal:
            build(family, tmp_path / key, rope, key=key)
        assert all(word.replace("rope_scaling 5", f"{key} 5") in str(refusal.value) for word in words), str(refusal.value)


def test_phimoe_as_published_goes_all_the_way(tmp_path: Path, stages: Path, rq_compile: Run) -> None:
    build("phimoe", tmp_path / "m", PHIMOE)
    text = ("--text", stages / "text.txt", "--sequence-length", 24)
    for more in (("--dry-run",), ()):
        result = rq_compile(tmp_path / "m", *text, "-o", tmp_path / "e.onnx", "-q", *more)
        assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "e.json").read_text())["recomputed_beyond"] == TRAINED
    result = rq_compile("package", tmp_path / "e.onnx", "--for", "edge", "-o", tmp_path / "edge", "-q")
    assert f"kRecomputedBeyond = {TRAINED};" in (tmp_path / "edge" / "generate.cc").read_text()
