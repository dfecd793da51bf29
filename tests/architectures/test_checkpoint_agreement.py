"""Differences between a config, tensors and the model's parameters: each kind has one result, and a model that opens has the
logits that transformers computes from the same folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from changed_checkpoints import Tensors, opened, refused

from rq_compile.architectures.model import Model
from rq_compile.export.exported import Exported
from rq_compile.files import read_document
from rq_compile.planning.schema import Plan
from rq_compile.targets.onnxruntime import compile_engine

# Missing


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("olmoe", "model.norm.weight"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("deepseek_v3", "model.layers.2.mlp.gate.e_score_correction_bias"),
        ("gpt_oss", "model.layers.0.self_attn.sinks"),
        ("granitemoe", "model.layers.1.block_sparse_moe.router.layer.weight"),
        ("switch_transformers", "decoder.final_layer_norm.weight"),
        ("mixtral", "model.embed_tokens.weight"),
    ],
)
def test_a_missing_weight_is_named(copy: Callable[..., Path], family: str, tensor: str) -> None:
    refused(copy(family, lambda tensors: tensors.pop(tensor)), f"has no tensor {tensor}, which its config.json needs")


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2", "llama_moe"])
def test_a_head_is_only_the_embedding_where_the_config_ties_it(copy: Callable[..., Path], family: str) -> None:
    without = lambda tensors: tensors.pop("lm_head.weight")  # noqa: E731
    refused(copy(family, without, tie_word_embeddings=False), "has no tensor lm_head.weight", "tie_word_embeddings is false")
    model = Model.open(copy(family, without, tie_word_embeddings=True))
    assert model.agreement.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.tensor("lm_head.weight") == "model.embed_tokens.weight"


def test_the_one_of_two_tied_weights_that_is_stored_is_both(copy: Callable[..., Path]) -> None:
    def only_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    model = opened(copy("olmoe", only_head, tie_word_embeddings=True))
    assert model.agreement.tied == {"model.embed_tokens.weight": "lm_head.weight"}


def test_tied_weights_that_differ_are_both_used(copy: Callable[..., Path]) -> None:
    opened(copy("olmoe", tie_word_embeddings=True), "lm_head.weight and model.embed_tokens.weight differ")

    def equal(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    opened(copy("olmoe", equal, tie_word_embeddings=True))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_a_wrapper_s_prefix_is_recognised(copy: Callable[..., Path], family: str, prefix: str) -> None:
    def wrapped(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"{prefix}{name}"] = tensors.pop(name)

    refused(copy(family, wrapped), f"are named {prefix}...", "without the prefix")

    def half(tensors: Tensors) -> None:
        name = next(name for name in tensors if "norm" in name)
        tensors[f"{prefix}{name}"] = tensors.pop(name)

    refused(copy(family, half), f"but it has {prefix}")


def test_a_model_without_its_head(copy: Callable[..., Path]) -> None:
    def bare(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    refused(copy("mixtral", bare), "without its head", "embed_tokens.weight, not model.embed_tokens.weight")


# Experts


def test_a_layer_with_fewer_experts(copy: Callable[..., Path]) -> None:
    def fewer(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.1." in name and (".experts.6." in name or ".experts.7." in name)]:
            del tensors[name]

    refused(copy("qwen3_moe", fewer), "model.layers.1.mlp.experts has 6 experts, but config.json says 8", "experts.6.")


@pytest.mark.parametrize("expert", [0, 3, 7])
@pytest.mark.parametrize("matrix", ["gate_proj", "up_proj", "down_proj"])
def test_an_expert_without_a_matrix(copy: Callable[..., Path], expert: int, matrix: str) -> None:
    tensor = f"model.layers.0.mlp.experts.{expert}.{matrix}.weight"
    refused(copy("olmoe", lambda tensors: tensors.pop(tensor)), f"has no tensor {tensor}; add the file that holds it")


@pytest.mark.parametrize(
    ("family", "key"), [("olmoe", "num_experts"), ("mixtral", "num_local_experts"), ("olmoe", "num_experts_per_tok")]
)
def test_a_number_for_each_layer(copy: Callable[..., Path], family: str, key: str) -> None:
    refused(copy(family, **{key: [4, 2]}), f"says {key} [4, 2], but one number for all layers is expected")


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("olmoe", "model.layers.1.mlp.experts.8.down_proj.weight"),
        ("olmoe", "model.layers.0.mlp.experts.11.up_proj.weight"),
        ("switch_transformers", "encoder.block.1.layer.1.mlp.experts.expert_6.wi.weight"),
        ("llama_moe", "model.layers.1.mlp.calculator.experts.weight_up.5"),
    ],
)
def test_an_expert_too_many(copy: Callable[..., Path], family: str, tensor: str) -> None:
    folder = copy(family, lambda tensors: tensors.update({tensor: torch.ones(3, 3)}))
    refused(folder, f"has {tensor}, but its config.json says")


def test_layers_that_the_config_calls_dense(copy: Callable[..., Path]) -> None:
    refused(
        copy("qwen2_moe", mlp_only_layers=[0, 1]), "model.layers.1.mlp.experts", "its config.json says that the layer is dense"
    )
    refused(copy("qwen2_moe", mlp_only_layers=[]), "has no tensor model.layers.0.mlp")


# Extra


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("olmoe", "mtp.fc.weight"),
        ("qwen2_moe", "visual.blocks.0.attn.qkv.weight"),
        ("mixtral", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("granitemoe", "model.layers.1.block_sparse_moe.extra"),
    ],
)
def test_a_tensor_that_no_weight_needs_is_a_remark(copy: Callable[..., Path], family: str, tensor: str) -> None:
    model = opened(copy(family, lambda tensors: tensors.update({tensor: torch.ones(4, 4)})), f"1 tensor ({tensor}) left out")
    assert model.agreement.unused == (tensor,)


def test_a_stray_number_of_another_type(copy: Callable[..., Path]) -> None:
    opened(copy("olmoe", lambda tensors: tensors.update(steps=torch.tensor(3), ids=torch.arange(9))), "2 tensors (ids, steps)")


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_layers_beyond_the_config_s(copy: Callable[..., Path], family: str) -> None:
    layers = tiny.CONFIGS[family]().num_hidden_layers
    model = opened(copy(family, num_hidden_layers=layers - 1), f"layer {layers - 1} of the checkpoint left out")
    assert max(layer.index for layer in model.layers) == layers - 2


# What is said


def test_remarks_stand_in_the_manifest(
    copy: Callable[..., Path],
    rq_compile: Callable[..., Any],
    stages: Path,
    model: Path,
    out: Path,
    export_once: Callable[[Model], Exported],
) -> None:
    odd = Model.open(copy("olmoe", lambda tensors: tensors.update({"mtp.norm.weight": torch.ones(3)})))
    exported = export_once(Model.open(model))  # the same graph
    plan = read_document(Plan, stages / "plan.json").model_copy(update={"fingerprint": odd.fingerprint, "quantizer": "nearest"})
    manifest = compile_engine(odd, plan, out / "model.onnx", exported=exported)
    assert manifest.remarks == ["1 tensor (mtp.norm.weight) left out: the model has no such weight"]
    assert "mtp.norm.weight" in " ".join(rq_compile("inspect", out / "model.onnx").stdout.split())
