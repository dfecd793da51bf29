"""Every family: experts and dense tensors read from the checkpoint equal what the loaded model holds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rq_compile.architectures.families import FAMILIES
from rq_compile.architectures.layers import ExpertWeights
from rq_compile.architectures.load import load_model, meta_model
from rq_compile.architectures.model import Model
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError
from rq_compile.targets.streamed import StreamedExpert

PER_EXPERT_OR_STACKED_ON_DISK = {
    "olmoe": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "qwen2_moe": "model.layers.1.mlp.experts.0.gate_proj.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "phimoe": "model.layers.0.block_sparse_moe.experts.0.w3.weight",
    "deepseek_v2": "model.layers.1.mlp.experts.0.gate_proj.weight",
    "deepseek_v3": "model.layers.1.mlp.experts.0.gate_proj.weight",
    "gpt_oss": "model.layers.0.mlp.experts.gate_up_proj",
    "granitemoe": "model.layers.0.block_sparse_moe.input_linear.weight",
    "switch_transformers": "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight",
    "llama_moe": "model.layers.0.mlp.calculator.experts.weight_gate.0",
    "deepseek": "model.layers.1.mlp.experts.0.gate_proj.weight",
}


def edited(directory: Path, target: Path, **changes: Any) -> Model:
    """A copy of the checkpoint with another config."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return Model.open(target)


def held(module: Any, expert: int) -> ExpertWeights:
    """One expert of the loaded model's experts module, in canonical layout."""
    if isinstance(module, nn.ModuleDict):
        dense: Any = module[f"expert_{expert}"]
        return ExpertWeights(dense.wi.weight.numpy(), dense.wo.weight.numpy())
    up, down = module.gate_up_proj[expert], module.down_proj[expert]
    if not hasattr(module, "gate_up_proj_bias"):
        return ExpertWeights(up.numpy(), down.numpy())
    bias = module.gate_up_proj_bias[expert]
    return ExpertWeights(
        torch.cat([up[:, ::2], up[:, 1::2]], 1).T.numpy(),
        down.T.numpy(),
        torch.cat([bias[::2], bias[1::2]]).numpy(),
        module.down_proj_bias[expert].numpy(),
    )


def assert_model_equals_checkpoint(checkpoint: Model) -> None:
    model, layers = load_model(checkpoint), checkpoint.layers
    assert not model.training
    for layer in layers:
        module = model.get_submodule(layer.name)
        for expert in range(layer.geometry.experts):
            read, expected = checkpoint.expert(layer, expert), held(module, expert)
            for field in ("up", "down", "up_bias", "down_bias"):
                ours, theirs = getattr(read, field), getattr(expected, field)
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    np.testing.assert_array_equal(ours.astype(np.float32), theirs)
    inside_experts = tuple(f"{layer.name}." for layer in layers)
    persistent = {**dict(model.named_parameters(remove_duplicate=False)), **model.state_dict()}
    compared = 0
    for name, values in persistent.items():
        assert values.dtype == torch.float32
        if not name.startswith(inside_experts):
            np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), values.numpy(), err_msg=name)
            compared += 1
    assert compared > len(layers)


def test_tiny_checkpoints_cover_every_family() -> None:
    assert set(tiny.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_reads_what_the_model_holds(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    checkpoint = Model.open(tiny_checkpoint(family))
    assert PER_EXPERT_OR_STACKED_ON_DISK[family] in checkpoint.checkpoint
    assert_model_equals_checkpoint(checkpoint)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "granitemoe", "gpt_oss"])
def test_reads_half_precision(tmp_path: Path, family: str) -> None:
    assert_model_equals_checkpoint(Model.open(tiny.build(family, tmp_path / "model", dtype=torch.bfloat16)))


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "phimoe", "granitemoe", "qwen3_moe"])
def test_reads_experts_stored_under_the_model_s_names(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    model = load_model(Model.open(tiny_checkpoint(family)))
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    checkpoint = Model.open(tmp_path / "stacked")
    assert f"{checkpoint.layers[0].name}.gate_up_proj" in checkpoint.checkpoint
    assert_model_equals_checkpoint(checkpoint)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_meta_model_is_the_model_without_weights(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    checkpoint = Model.open(tiny_checkpoint(family))
    real, meta = load_model(checkpoint), meta_model(checkpoint)
    assert type(real) is type(meta)
    shapes = {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in meta.state_dict().items()}
    assert all(parameter.is_meta for parameter in meta.parameters())
    persistent = meta.state_dict().keys()
    buffers = dict(meta.named_buffers())
    for name, buffer in real.named_buffers():
        if name not in persistent:
            torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_routing_uses_the_geometry(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    """Each experts module is called once per forward, with gates of ``top_k``; more than one expert is chosen."""
    checkpoint = Model.open(tiny_checkpoint(family))
    model = load_model(checkpoint)
    chosen: dict[str, torch.Tensor] = {}
    for layer in checkpoint.layers:
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, inputs, keywords, name=layer.name: chosen.__setitem__(name, [*inputs, *keywords.values()][1]),
            with_kwargs=True,
        )
    tokens = torch.randint(4, tiny.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    assert torch.isfinite(model(input_ids=tokens, **decoder).logits).all()
    for layer in checkpoint.layers:
        ids = chosen[layer.name]
        if decoder:
            assert ids.shape[-1] == layer.geometry.experts
            assert (ids.sum(dim=(0, 1)) > 0).sum() > 1
        else:
            assert ids.shape == (32, layer.geometry.top_k)
            assert ids.unique().numel() > layer.geometry.top_k
            assert ids.max() < layer.geometry.experts


def block_output(checkpoint: Model, layer: int, x: torch.Tensor) -> torch.Tensor:
    return load_model(checkpoint).model.layers[layer].mlp(x[None])[0]


def swiglu_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_llama_moe_block_computes_its_definition(tiny_checkpoint: Callable[[str], Path]) -> None:
    directory = tiny_checkpoint("llama_moe")
    tensors = load_file(directory / "model.safetensors")
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(3))
    at = "model.layers.1.mlp"
    first, second = (tensors[f"{at}.gate.gate_network.{number}.weight"] for number in (0, 2))
    logits = torch.tanh(x @ first.T) @ second.T
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        order = logits[token].argsort(descending=True)[:2]
        scores = logits[token, order].softmax(0) * 2.0
        for expert, score in zip(order.tolist(), scores, strict=True):
            weights = [tensors[f"{at}.calculator.experts.weight_{part}.{expert}"] for part in ("gate", "up", "down")]
            expected[token] += score * swiglu_mlp(x[token], *weights)
    torch.testing.assert_close(block_output(Model.open(directory), 1, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalized", [False, True])
def test_deepseek_block_computes_its_definition(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, normalized: bool) -> None:
    checkpoint = edited(tiny_checkpoint("deepseek"), tmp_path / "model", norm_topk_prob=normalized)
    tensors = load_file(checkpoint.path / "model.safetensors")
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(3))
    at = "model.layers.2.mlp"

    def mlp(name: str, rows: torch.Tensor) -> torch.Tensor:
        return swiglu_mlp(rows, *(tensors[f"{at}.{name}.{part}_proj.weight"] for part in ("gate", "up", "down")))

    probabilities = (x @ tensors[f"{at}.gate.weight"].T).softmax(-1)
    expected = mlp("shared_experts", x)
    for token in range(len(x)):
        order = probabilities[token].argsort(descending=True)[:2]
        gates = probabilities[token, order]
        for expert, gate in zip(order.tolist(), gates / gates.sum() if normalized else gates, strict=True):
            expected[token] += gate * mlp(f"experts.{expert}", x[token])
    torch.testing.assert_close(block_output(checkpoint, 2, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "key", "value", "activation"),
    [
        ("olmoe", "hidden_act", "silu", "swiglu"),
        ("olmoe", "hidden_act", "gelu", "geglu"),
        ("mixtral", "hidden_act", "gelu_pytorch_tanh", "geglu_tanh"),
        ("switch_transformers", "dense_act_fn", "relu", "relu"),
        ("switch_transformers", "dense_act_fn", "gelu", "gelu"),
    ],
)
def test_activation_follows_the_config(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, key: str, value: str, activation: str
) -> None:
    checkpoint = edited(tiny_checkpoint(family), tmp_path / "model", **{key: value})
    assert {layer.geometry.activation for layer in checkpoint.layers} == {activation}


def test_refuses_another_activation(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts .* hidden_act=mish, .* silu"):
        edited(tiny_checkpoint("qwen2_moe"), tmp_path / "model", hidden_act="mish")


def test_ignores_layers_beyond_the_model_s(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """DeepSeek-V3's multi-token-prediction head is stored as an additional layer."""
    checkpoint = edited(tiny_checkpoint("deepseek_v3"), tmp_path / "model", num_hidden_layers=2)
    assert [layer.index for layer in checkpoint.layers] == [1]


def test_refuses_a_dense_model(tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**small)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not an MoE: the model llama has no experts"):
        Model.open(tmp_path)


def test_lists_the_supported_families(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        edited(tiny_checkpoint("olmoe"), tmp_path / "model", model_type="unknown_moe")
    assert "unknown_moe" in str(caught.value)
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize("family", ["olmoe", "llama_moe"])
def test_refuses_a_checkpoint_that_lacks_a_tensor(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    shutil.copytree(tiny_checkpoint(family), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no tensor model\.norm\.weight, which its config\.json needs"):
        load_model(Model.open(tmp_path / "model"))


@pytest.mark.parametrize(("key", "value"), [("gate_network", "linear"), ("size_experts", [[32, 32, 48, 16]] * 2)])
def test_refuses_another_llama_moe(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        edited(tiny_checkpoint("llama_moe"), tmp_path / "model", **{key: value})


def test_tiny_tokenizer_round_trips(tiny_checkpoint: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("olmoe"))
    tokens = tokenizer("In the beginning", add_special_tokens=False).input_ids
    assert len(tokens) == 16
    assert max(tokens) < tiny.VOCABULARY
    assert str(tokenizer.decode(tokens)).replace(" ", "") == "Inthebeginning"
    assert tokenizer.eos_token_id == 1


def test_a_bias_is_read_alone(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.open(tiny_checkpoint("gpt_oss"))
    read: list[str] = []
    original = Checkpoint.read_row

    def read_row(self: Checkpoint, name: str, row: int) -> np.ndarray:
        read.append(name)
        return original(self, name, row)

    monkeypatch.setattr(Checkpoint, "read_row", read_row)
    expert = StreamedExpert(model, model.layers[0], 1, None)
    for weight, tensor in (("up_bias", "gate_up_proj_bias"), ("down_bias", "down_proj_bias"), ("up", "gate_up_proj")):
        assert getattr(expert, weight) is not None
        assert [name.rpartition(".")[2] for name in read] == [tensor]
        read.clear()
