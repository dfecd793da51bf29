"""``rq-compile inspect MODEL``: the contents of a checkpoint folder, and the reason if it cannot be compiled."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command_line import Run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(rq_compile: Run, tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    folder = tiny_checkpoint(family)
    result = rq_compile("inspect", folder, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["kind"], found["model_type"], found["compiles"], found["why_not"]) == ("checkpoint", family, True, None)
    assert found["dtypes"] == {"F32": found["bytes"]}
    assert found["layers"]
    assert found["expert_bytes"] == sum(layer["bytes"] for layer in found["layers"])
    assert found["end_of_text"] == [1]
    assert found["tokenizer"]
    text = rq_compile("inspect", folder).stdout
    assert family in text
    assert "compiles" in text


def test_counts_are_those_of_the_model(rq_compile: Run, tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint("qwen2_moe")
    found = json.loads(rq_compile("inspect", folder, "--json").stdout)
    model = AutoModelForCausalLM.from_pretrained(folder)
    experts = [module for name, module in model.named_modules() if name.endswith("mlp.experts")]
    weights = sum(parameter.numel() for module in experts for parameter in module.parameters())
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["active_parameters"] == found["parameters"] - weights + weights * 2 // 8
    assert found["expert_bytes"] == 4 * weights
    assert [layer["index"] for layer in found["layers"]] == [1, 2]


def changed(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**stated, **config}))
    return target


def test_what_is_tied_ignored_and_remarked(rq_compile: Run, model: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["mtp.norm.weight"] = torch.ones(3)

    folder = changed(model, tmp_path / "model", change, tie_word_embeddings=True, quantization_config={"quant_method": "fp8"})
    found = json.loads(rq_compile("inspect", folder, "--json").stdout)
    assert found["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert found["unused"] == ["mtp.norm.weight"]
    assert len(found["remarks"]) == 2
    text = " ".join(rq_compile("inspect", folder).stdout.split())
    for words in ("lm_head.weight = model.embed_tokens.weight", "mtp.norm.weight", "quantization_config: fp8", "left out"):
        assert words in text


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), {}, "has no tensor model.norm.weight"),
        (lambda tensors: None, {"model_type": "some_moe"}, "the model_type some_moe"),
        (lambda tensors: None, {"hidden_act": "mish"}, "hidden_act=mish"),
        (lambda tensors: None, {"num_experts": 9}, "has 8 experts, but config.json says 9"),
        (lambda tensors: None, {"eos_token_id": "end"}, "eos_token_id"),
    ],
)
def test_why_not(
    rq_compile: Run, model: Path, tmp_path: Path, change: Callable[[object], object], config: dict[str, Any], words: str
) -> None:
    folder = changed(model, tmp_path / "model", change, **config)
    if "eos_token_id" in config:
        (folder / "generation_config.json").unlink(missing_ok=True)
    result = rq_compile("inspect", folder, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert not found["compiles"]
    assert words in found["why_not"]
    assert found["tensors"] > 50
    assert "no: " in rq_compile("inspect", folder).stdout


def test_a_dense_model(rq_compile: Run, tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**small)).save_pretrained(tmp_path)
    found = json.loads(rq_compile("inspect", tmp_path, "--json").stdout)
    assert (found["model_type"], found["compiles"], found["tokenizer"]) == ("llama", False, False)
    assert "is not an MoE" in found["why_not"]


def test_what_is_not_a_checkpoint(rq_compile: Run, model: Path, tmp_path: Path) -> None:
    for folder, words in ((tmp_path, "is an empty folder"), (model.parent.parent / "nowhere", "cannot read")):
        result = rq_compile("inspect", folder)
        assert result.exit_code == 2
        assert words in result.stderr
        assert "Traceback" not in result.stderr
    assert "--verify checks an engine's files" in rq_compile("inspect", model, "--verify").stderr
