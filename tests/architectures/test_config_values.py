"""What a config states and how weights are stored: quantization that no tensor has, several formats, numbers of another type,
settings of training, and sizes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from changed_checkpoints import refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from rq_compile.architectures.config_values import NEUTRAL
from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.export.export import export_graph
from rq_compile.export.exported import Exported

# Types


@pytest.mark.parametrize("config", [{"quant_method": "fp8"}, {"quant_method": "mxfp4"}, "x", {"bits": 4}])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantization_that_no_tensor_has(copy: Callable[..., Path], key: str, config: object) -> None:
    model = Model.open(copy("gpt_oss", **{key: config}))
    assert len(model.remarks) == 1
    assert "no tensor is quantized" in model.remarks[0]
    assert not hasattr(model.config, key)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_a_weight_of_whole_numbers(copy: Callable[..., Path], dtype: torch.dtype) -> None:
    for tensor in ("model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight"):
        folder = copy("olmoe", lambda tensors, name=tensor: tensors.update({name: tensors[name].to(dtype)}))
        refused(folder, f"{tensor} of", "is stored as", "convert it")


@pytest.mark.parametrize("changed", ["experts.0.", "experts.", "experts.3.up_proj"])
def test_experts_in_several_formats(tmp_path: Path, rq_compile: Callable[..., Any], changed: str) -> None:
    """The error of rounding some fp32 experts to the others' bf16 is measured by the calibration, counts in every policy, and is
    reported."""
    config = {**tiny.REMOTE_CONFIGS["deepseek"], "num_hidden_layers": 5}
    tiny.build("deepseek", tmp_path / "model", dtype=torch.bfloat16)
    folder = tmp_path / "model"
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for layer in (3, 4):
        tensors |= {name.replace(".2.", f".{layer}.", 1): t.clone() for name, t in tensors.items() if ".layers.2." in name}
    for name in [name for name in tensors if f".layers.1.mlp.{changed}" in name]:
        tensors[name] = torch.randn(tensors[name].shape, generator=generator) * 0.2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    model = Model.open(folder)
    assert model.dtype == "bf16"
    assert model.remarks == ("experts of layer 1 are stored in fp32, most others in bf16: a plan counts and rounds them as bf16",)

    (tmp_path / "text").write_text("a text of some words " * 9)
    calibration, plan = tmp_path / "calibration.json", tmp_path / "plan.json"
    said = rq_compile("calibrate", folder, "--text", tmp_path / "text", "--quantizer", "nearest", "-o", calibration).stderr
    assert "experts of layer 1 are stored in fp32" in said
    for policy in ("none", "optimal"):
        result = rq_compile("plan", calibration, "--policy", policy, "--memory", 1.0, "-o", plan, "--json")
        assert result.exit_code == 0, result.stderr
        errors = [layer["predicted"]["error"] for layer in json.loads(result.stdout)["layers"]]
        assert 0 < errors[0] < 1e-4
        assert policy == "optimal" or errors[1:] == [0, 0, 0]


# Values of the config


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("deepseek_v2", {"routed_scaling_factor": 1}),
        ("deepseek_v3", {"routed_scaling_factor": 2, "n_group": 4.0}),
        ("gpt_oss", {"swiglu_limit": 7}),
        ("olmoe", {"clip_qkv": 8}),
        ("olmoe", {"rms_norm_eps": 1}),
        ("mixtral", {"num_experts_per_tok": 2.0, "num_local_experts": 4.0}),
        ("qwen3_moe", {"num_hidden_layers": 2.0, "vocab_size": 128.0, "norm_topk_prob": 1}),
        ("granitemoe", {"residual_multiplier": 1, "logits_scaling": 2, "embedding_multiplier": 12, "attention_multiplier": 1}),
        ("llama_moe", {"rms_norm_eps": 1, "num_selects": 1.0}),
    ],
)
def test_a_number_is_of_the_declared_type(copy: Callable[..., Path], family: str, config: dict[str, Any]) -> None:
    written = {key: type(value)(value) for key, value in config.items()}
    as_declared = {
        key: float(value) if type(value) is int and key != "norm_topk_prob" else int(value) for key, value in written.items()
    } | ({"norm_topk_prob": True} if "norm_topk_prob" in written else {})
    ids = torch.arange(3, 30)[None]
    with torch.inference_mode():
        ours = load_model(Model.open(copy(family, **written)))(input_ids=ids).logits
        expected = load_model(Model.open(copy(family, **as_declared)))(input_ids=ids).logits
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("config", [{"num_experts_per_tok": 2.5}, {"rms_norm_eps": "1e-6"}, {"vocab_size": "128"}])
def test_what_is_no_number_of_the_declared_type(copy: Callable[..., Path], config: dict[str, Any]) -> None:
    refused(copy("olmoe", **config), next(iter(config)))


TRAINING = {
    "output_router_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "use_cache": False,
    "torchscript": True,
    "gradient_checkpointing": True,
    "attention_dropout": 0.5,
    "hidden_dropout": 0.1,
    "router_aux_loss_coef": 1,
    "problem_type": "regression",
}


def test_settings_of_training_do_not_change_the_graph(
    copy: Callable[..., Path], model: Path, export_once: Callable[[Model], Exported]
) -> None:
    plain, trained = export_once(Model.open(model)), export_graph(Model.open(copy("olmoe", **TRAINING)))
    assert trained.model.SerializeToString(deterministic=True) == plain.model.SerializeToString(deterministic=True)
    assert trained.cache == plain.cache


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_settings_of_training_are_neutral(copy: Callable[..., Path], family: str) -> None:
    config, trained = Model.open(copy(family)).config.to_dict(), Model.open(copy(family, **TRAINING)).config.to_dict()
    differ = {key for key in TRAINING if config.get(key, NEUTRAL.get(key)) != trained.get(key, NEUTRAL.get(key))}
    assert differ <= {"attention_dropout", "hidden_dropout", "router_aux_loss_coef"}
    assert trained.get("attention_dropout", 0) == trained.get("hidden_dropout", 0) == 0


# Sizes


@pytest.mark.parametrize(("hidden", "intermediate"), [(30, 33), (32, 33), (30, 48), (36, 34)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: int, intermediate: int, dtype: torch.dtype
) -> None:
    """torch's grouped product needs rows of a multiple of 16 bytes."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    monkeypatch.setitem(tiny.CONFIGS, "mixtral", lambda: MixtralConfig(**{**tiny.COMMON, **sizes}, num_local_experts=4))
    folder = tiny.build("mixtral", tmp_path / "model", dtype=dtype)
    model = Model.open(folder)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        ours = load_model(model)(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")(input_ids=ids)
    torch.testing.assert_close(ours, theirs.logits, rtol=1e-5, atol=1e-5)
