"""Config and tensors that differ, in families that transformers' loader places: the results are those of declared families."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_types
import pytest
import tiny_storage
import torch
from changed_checkpoints import Tensors, changed, refused
from safetensors.torch import load_file, save_file

from rq_compile.architectures.model import Model
from rq_compile.inspection import inspected

Copy = Callable[..., Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    known: dict[str, Path] = {}

    def build(model_type: str) -> Path:
        if model_type not in known:
            known[model_type] = model_types.build(model_type, tmp_path_factory.mktemp("types") / model_type)
        return known[model_type]

    return build


@pytest.fixture
def copy(built: Callable[[str], Path], tmp_path: Path) -> Copy:
    """``copy(type, change, keys...)``: a checkpoint whose tensors ``change`` has changed, and keys of its text config."""

    def make(model_type: str, change: Callable[[Tensors], object] | None = None, **keys: Any) -> Path:
        return changed(built(model_type), tmp_path, lambda stated: stated.get("text_config", stated).update(keys), change)

    return make


def remarks(folder: Path) -> list[str]:
    return [remark for remark in Model.open(folder).remarks if "ends a text" not in remark]


@pytest.mark.parametrize(
    ("model_type", "tensor"),
    [
        ("glm4_moe", "lm_head.weight"),
        ("qwen3_5_moe", "lm_head.weight"),
        ("nemotron_h", "lm_head.weight"),
        ("lfm2_moe", "model.embed_tokens.weight"),
        ("gemma4", "model.language_model.embed_tokens.weight"),
        ("nemotron_h", "backbone.layers.0.mixer.A_log"),
        ("nemotron_h", "backbone.norm_f.weight"),
        ("minimax_m2", "model.layers.2.block_sparse_moe.gate.weight"),
        ("minimax_m2", "model.layers.1.block_sparse_moe.e_score_correction_bias"),
        ("axk1", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("gemma4", "model.language_model.layers.1.router.per_expert_scale"),
        ("glm4_moe", "model.layers.1.mlp.experts.0.down_proj.weight"),
        ("qwen3_5_moe", "model.language_model.layers.2.mlp.experts.7.gate_proj.weight"),
        ("nemotron_h", "backbone.layers.1.mixer.experts.3.up_proj.weight"),
    ],
)
def test_a_missing_weight_is_named(copy: Copy, model_type: str, tensor: str) -> None:
    """This includes a tensor that the loader would fill with new values, and a single matrix of one expert."""
    refused(copy(model_type, lambda tensors: tensors.pop(tensor)), f"has no tensor {tensor}")


def test_a_head_is_only_the_embedding_where_the_config_ties_it(copy: Copy) -> None:
    refused(copy("glm4_moe", lambda tensors: tensors.pop("lm_head.weight")), "tie_word_embeddings is false")
    tied = copy("glm4_moe", lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True)
    assert Model.open(tied).agreement.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert any("differ, although config.json ties them" in said for said in remarks(copy("glm4_moe", tie_word_embeddings=True)))


@pytest.mark.parametrize("experts", [7, 9])
@pytest.mark.parametrize(
    ("model_type", "key"), [("glm4_moe", "n_routed_experts"), ("qwen3_5_moe", "num_experts"), ("nemotron_h", "n_routed_experts")]
)
def test_another_number_of_experts(copy: Copy, model_type: str, key: str, experts: int) -> None:
    refused(
        copy(model_type, **{key: experts}), "experts.", f"{experts} experts" if experts == 7 else f"config.json says {experts}"
    )


def test_a_layer_with_fewer_experts(copy: Copy) -> None:
    def fewer(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.2." in name and (".experts.6." in name or ".experts.7." in name)]:
            del tensors[name]

    refused(copy("glm4_moe", fewer), "model.layers.2.mlp.experts has 6 experts, but config.json says 8", "experts.6.")


@pytest.mark.parametrize(
    ("model_type", "tensor"), [("glm4_moe", "model.layers.1.input_layernorm.weight"), ("nemotron_h", "backbone.norm_f.weight")]
)
def test_a_weight_of_another_shape_or_type(copy: Copy, model_type: str, tensor: str) -> None:
    refused(copy(model_type, lambda tensors: tensors.update({tensor: torch.ones(7)})), f"{tensor} of", "has shape [7], but")
    for dtype in (torch.int64, torch.bool):
        changed = copy(model_type, lambda tensors, dtype=dtype: tensors.update({tensor: tensors[tensor].to(dtype)}))
        refused(changed, f"{tensor} of", "is stored as")


@pytest.mark.parametrize(
    ("model_type", "tensor"),
    [
        ("glm4_moe", "model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("qwen3_5_moe", "model.language_model.layers.1.extra"),
        ("nemotron_h", "mtp.fc.weight"),
    ],
)
def test_a_tensor_that_no_weight_needs(copy: Copy, model_type: str, tensor: str) -> None:
    said = remarks(copy(model_type, lambda tensors: tensors.update({tensor: torch.ones(4)})))
    assert said[0] == f"1 tensor ({tensor}) left out: the model has no such weight"
    assert [remark.endswith("left out: an engine reads text only") for remark in said[1:]] == [True] * (
        model_type == "qwen3_5_moe"
    )


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "qwen3_vl_moe", "glm4v_moe", "glm4_moe"])
def test_what_is_for_vision_and_sound_is_left_out(copy: Copy, model_type: str) -> None:
    model = Model.open(copy(model_type))
    text = ("model.language_model.", "lm_head.") if model_type != "glm4_moe" else ""
    parts = [name for name in model.checkpoint.names if not name.startswith(text)]
    assert bool(parts) == (model_type != "glm4_moe")
    assert inspected(model.checkpoint).unused == parts
    told = [remark for remark in model.remarks if remark.endswith("left out: an engine reads text only")]
    assert [remark.startswith(f"{len(parts)} tensors ({parts[0]}, ") for remark in told] == [True] * bool(parts)


def test_layers_beyond_the_config_s(copy: Copy) -> None:
    (said,) = remarks(copy("glm4_moe", num_hidden_layers=3))
    assert said.startswith("layer 3 of the checkpoint left out")
    assert said.endswith("the model has 3 layers")


HUGE = 10**9


@pytest.mark.parametrize("model_type", ["glm4_moe", "gemma4", "qwen3_5_moe"])
@pytest.mark.parametrize(
    "keys",
    [
        {"num_hidden_layers": HUGE},
        {"vocab_size": HUGE},
        {"num_attention_heads": HUGE},
        {"num_experts_per_tok": 99},
        {"top_k_experts": 99, "num_experts_per_tok": 99},
        {"num_experts_per_tok": 0, "top_k_experts": 0},
        {"rope_parameters": {"rope_type": "yarnx", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
        {"hidden_act": "siluu", "hidden_activation": "siluu"},
    ],
    ids=lambda keys: f"{next(iter(keys))}={next(iter(keys.values()))}"[:40],
)
def test_a_number_or_a_name_that_cannot_be(copy: Copy, model_type: str, keys: dict[str, Any]) -> None:
    """This also holds for the language model in a multimodal one. The work does not grow with the number."""
    if model_type == "gemma4" and "top_k_experts" not in keys and "num_experts_per_tok" in keys:
        pytest.skip("Gemma calls it top_k_experts")
    refused(copy(model_type, **keys), "config.json")


@pytest.mark.parametrize(
    ("model_type", "layer", "key"),
    [
        ("gemma4_text", "3", "head_dim"),
        ("gemma4", "1", "num_key_value_heads"),
        ("dots3_note_text", "1", "kv_lora_rank"),
        ("step3p7", "3", "num_attention_heads"),
    ],
)
@pytest.mark.parametrize("size", [HUGE, "16", -1])
def test_a_size_of_one_layer_that_cannot_be(
    built: Callable[[str], Path], tmp_path: Path, model_type: str, layer: str, key: str, size: object
) -> None:
    """In families whose layers differ in their sizes, which config.json states by layer."""

    def change(stated: dict[str, Any]) -> None:
        stated.get("text_config", stated)["per_layer_config"][layer][key] = size

    refused(changed(built(model_type), tmp_path, change), "config.json")


def test_layers_may_differ_in_their_sizes(built: Callable[[str], Path]) -> None:
    stated = json.loads((built("gemma4") / "config.json").read_text())["text_config"]
    assert stated["per_layer_config"]["1"]["head_dim"] != stated["head_dim"]
    assert len(Model.open(built("gemma4")).layers) == stated["num_hidden_layers"]


def test_layers_of_what_reads_images(built: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built("qwen3_5_moe"), tmp_path / "model"))
    stated = json.loads((folder / "config.json").read_text())
    stated["vision_config"]["depth"] = HUGE
    (folder / "config.json").write_text(json.dumps(stated))
    refused(folder, f"says depth {HUGE}")


def test_quantized_weights_that_are_missing(built: Callable[[str], Path], tmp_path: Path) -> None:
    """This also holds for storage formats: the names are those of the decoded weights."""
    plain = Path(shutil.copytree(built("glm4_moe"), tmp_path / "plain"))
    made = tiny_storage.store(plain, tmp_path / "stored", tiny_storage.FORMATS["fp8"])
    for shard in made.glob("*.safetensors"):
        tensors = load_file(shard)
        kept = {name: t for name, t in tensors.items() if ".layers.1.mlp.experts.2.up_proj." not in name}
        save_file(kept, shard, {"format": "pt"})
    (made / "model.safetensors.index.json").unlink()
    refused(made, "has no tensor model.layers.1.mlp.experts.2.up_proj.weight")


def test_transformers_is_quiet(copy: Copy, capfd: pytest.CaptureFixture[str]) -> None:
    """Its warnings about a config are either given by us or not about anything unusual."""
    Model.open(copy("glm4_moe", eos_token_id=-1))
    assert capfd.readouterr().err == ""
