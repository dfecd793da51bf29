"""Differences between a config, tensors and the model's parameters: each kind has one result, and a model that opens has the
logits that transformers computes from the same folder."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from changed_checkpoints import Tensors, changed, refused
from hostile import INDEX
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from rq_compile.architectures.config_values import NEUTRAL
from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.export.export import Exported, export_graph
from rq_compile.files import read_document
from rq_compile.planning.schema import Plan
from rq_compile.targets.onnxruntime import compile_engine


@pytest.fixture
def copy(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """``copy(family, tensors, config...)``: a family's checkpoint whose tensors ``change`` has changed, and values of its config
    (None: without the key)."""

    def make(family: str, change: Callable[[Tensors], object] | None = None, **config: Any) -> Path:
        def settle(stated: dict[str, Any]) -> None:
            stated |= config
            for key in [key for key, value in stated.items() if value is None]:
                del stated[key]

        return changed(tiny_checkpoint(family), tmp_path, settle, change)

    return make


def opened(folder: Path, *remarks: str) -> Model:
    """Check that the model computes what transformers does and gives exactly ``remarks``, and return it."""
    model = Model.open(folder)
    assert len(model.remarks) == len(remarks), model.remarks
    for remark, words in zip(model.remarks, remarks, strict=True):
        assert words in remark
        assert remark.isprintable()
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        ours = load_model(model)(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    return model


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


def sharded(folder: Path, listed: Mapping[str, str | None] | None = None) -> Path:
    """The checkpoint in two shards; ``listed`` changes the index (None: without the name)."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str | None] = {}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    weight_map |= listed or {}
    index = {"weight_map": {name: file for name, file in weight_map.items() if file is not None}}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, **index}))
    return folder


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "model-00003-of-00003.safetensors"])
def test_a_tensor_only_in_the_index(copy: Callable[..., Path], file: str) -> None:
    folder = sharded(copy("olmoe"), {"mtp.norm.weight": file})
    model = Model.open(folder)
    assert [remark for remark in model.remarks if "1 tensor (mtp.norm.weight) listed in the index but in no file" in remark]
    del_listed = sharded(copy("olmoe", lambda tensors: tensors.pop("model.norm.weight")), {"model.norm.weight": file})
    refused(del_listed, "has no tensor model.norm.weight (the index lists it in", file)


def test_a_tensor_only_in_its_shard(copy: Callable[..., Path]) -> None:
    opened(sharded(copy("olmoe"), {"model.norm.weight": None}), "does not say where model.norm.weight is")


def test_an_index_that_names_the_wrong_shard(copy: Callable[..., Path]) -> None:
    folder = sharded(copy("olmoe"))
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    file = index["weight_map"]["lm_head.weight"]
    index["weight_map"]["lm_head.weight"] = next(other for other in files if other != file)
    (folder / INDEX).write_text(json.dumps(index))
    opened(folder, "does not say where lm_head.weight is")


# Two sets of weights


def test_an_old_index_beside_a_newer_file(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = sharded(copy("olmoe"))
    tiny.build("olmoe", tmp_path / "newer", seed=1)
    shutil.copy(tmp_path / "newer" / "model.safetensors", folder)
    model = opened(folder, f"the weights are read from model.safetensors; {INDEX} lists 2 other files, which are left out")
    assert [file.name for file in model.checkpoint.files] == ["model.safetensors"]


def test_an_old_index_whose_shards_are_gone(copy: Callable[..., Path]) -> None:
    folder = copy("olmoe")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}}))
    opened(folder, "was not written with it")
    (folder / "model.safetensors").unlink()
    refused(folder, "model-00001-of-00009.safetensors is missing, as are all files")


def test_files_that_are_not_weights(copy: Callable[..., Path], tmp_path: Path, rq_compile: Callable[..., Any]) -> None:
    folder = sharded(copy("olmoe"))
    (folder / INDEX).unlink()
    (folder / "._model-00001-of-00002.safetensors").write_bytes(b"\0\5\26\7Mac OS X")
    (folder / ".b.safetensors").write_bytes(b"")
    (tmp_path / "text").write_text("a text of some words " * 9)
    result = rq_compile("calibrate", folder, "--text", tmp_path / "text", "-o", folder / "calibration.json", "-q")
    assert result.exit_code == 0, result.stderr
    assert (folder / "calibration.safetensors").exists()
    assert Model.open(folder).remarks == ()


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


# What is not a checkpoint


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4cac\nsize 12345\n"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", INDEX, "model-00001-of-00002.safetensors"]
)
def test_a_pointer_of_git_lfs(copy: Callable[..., Path], file: str) -> None:
    folder = copy("olmoe")
    if file not in ("model.safetensors", "tokenizer.json"):
        sharded(folder)
    (folder / file).write_text(POINTER)
    refused(folder, f"{file} is a git-lfs pointer", f"run git lfs pull in {folder}")


def test_a_folder_above_the_checkpoint(copy: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "models--some--moe"
    for revision in ("0123abcd", "4567cdef"):
        shutil.copytree(copy("olmoe"), root / "snapshots" / revision)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("4567cdef")
    refused(root, f"{root} is not a checkpoint, but {root / 'snapshots' / '4567cdef'} is; give that one")
    shutil.rmtree(root / "refs")
    refused(root, "config.json is missing")
    shutil.rmtree(root / "snapshots" / "4567cdef")
    refused(root, f"{root / 'snapshots' / '0123abcd'} is; give that one")
    above = tmp_path / "cache"
    above.mkdir()
    root.rename(above / root.name)
    refused(above, f"{above / root.name / 'snapshots' / '0123abcd'} is; give that one")


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
