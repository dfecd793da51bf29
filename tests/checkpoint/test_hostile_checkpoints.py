"""Checkpoints from an attacker or a broken download: each is rejected with one sentence, and no file outside is read."""

import json
import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from changed_checkpoints import sharded as in_two_shards
from hostile import INDEX, one_sentence, refused, write
from safetensors.torch import load_file, save_file

from rq_compile.architectures.load import load_model, meta_model
from rq_compile.architectures.model import Model
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.checkpoint.safetensors_file import all_finite
from rq_compile.errors import UserError

# The folder


@pytest.fixture
def sharded(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny OLMoE in two shards with an index."""
    return in_two_shards(Path(shutil.copytree(tiny_checkpoint("olmoe"), tmp_path / "sharded")))


FIRST = "model-00001-of-00002.safetensors"


def reindexed(directory: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """The message after ``change`` was applied to the index's weight_map."""
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))
    return refused(directory)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/../../x", "", ".", "a\\b", "a\nb", "a\0b", "..", "\ud800"]
)
def test_the_index_names_only_what_is_inside(sharded: Path, name: str) -> None:
    shutil.copy(sharded / FIRST, sharded.parent / "outside.safetensors")
    message = reindexed(sharded, lambda weights: weights.update({"lm_head.weight": name}))
    assert "not a path inside it" in message


def test_a_name_too_long_for_a_file_is_that_of_none(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "x" * 5000)
    (sharded / INDEX).write_text(json.dumps(index))
    assert "is missing, as are all files" in refused(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"a": 1}, {"a": None}, {"a\nb": FIRST}, {"a": [FIRST]}])
def test_an_index_of_another_shape_is_refused(sharded: Path, weight_map: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert str(sharded / INDEX) in refused(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    weights = json.loads((sharded / INDEX).read_text())["weight_map"]
    shutil.copy(sharded / FIRST, sharded / "again.safetensors")
    tensor = next(name for name in weights if weights[name] == FIRST)
    assert "is in" in reindexed(sharded, lambda weights: weights.update({tensor: "again.safetensors"}))
    (sharded / INDEX).unlink()
    assert "remove one of the two files" in refused(sharded)


def test_links_inside_the_folder_are_followed(sharded: Path) -> None:
    (sharded / "store").mkdir()
    (sharded / FIRST).rename(sharded / "store" / "one")
    (sharded / FIRST).symlink_to("store/one")
    assert "model.norm.weight" in Checkpoint.open(sharded)
    link = sharded.parent / "link"
    link.symlink_to(sharded)
    assert "model.norm.weight" in Checkpoint.open(link)


@pytest.mark.parametrize("name", [FIRST, "config.json", "tokenizer.json", "LICENSE"])
def test_a_link_out_of_the_folder_is_refused(sharded: Path, name: str) -> None:
    outside = sharded.parent / "outside"
    if (sharded / name).exists():
        (sharded / name).rename(outside)
    else:
        outside.write_text("a secret")
    (sharded / name).symlink_to(outside)
    assert f"has a link '{name}' out of it; put the file itself in its place" in refused(sharded)


def test_a_folder_on_the_way_to_a_shard_may_not_lead_out(sharded: Path) -> None:
    """Links below the folder are checked if the index names them."""
    outside = sharded.parent / "outside"
    outside.mkdir()
    shutil.copy(sharded / FIRST, outside / "x.safetensors")
    (sharded / "a").mkdir()
    (sharded / "a" / "b").symlink_to(outside)
    message = reindexed(sharded, lambda weights: weights.update({"lm_head.weight": "a/b/x.safetensors"}))
    assert "'a/b/x.safetensors', which is a link out of it" in message


def test_links_in_a_circle_are_refused(sharded: Path) -> None:
    (sharded / "a").symlink_to("b")
    (sharded / "b").symlink_to("a")
    assert "has a link 'a'" in refused(sharded)


def hub_cache(directory: Path, root: Path) -> Path:
    """``directory`` as the hub's client would have downloaded it."""
    repository = root / "models--some--moe"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_hub_cache_is_read(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(sharded, tmp_path / "hub")
    expected, cached = Checkpoint.open(sharded), Checkpoint.open(snapshot)
    assert cached.fingerprint == expected.fingerprint
    for name in expected.names:
        np.testing.assert_array_equal(cached.read(name), expected.read(name))
    model, same = (load_model(Model.open(folder)).state_dict() for folder in (snapshot, sharded))
    assert all(torch.equal(model[name], same[name]) for name in same)


def test_a_hub_cache_has_only_blobs_of_its_own(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(sharded, tmp_path / "hub")
    (snapshot / FIRST).unlink()
    another = tmp_path / "hub" / "models--other--moe" / "blobs"
    another.mkdir(parents=True)
    shutil.copy(sharded / FIRST, another / "x")
    (snapshot / FIRST).symlink_to(another / "x")
    assert f"has a link '{FIRST}' out of it" in refused(snapshot)


@pytest.mark.parametrize(
    "content", ["[]", "1", '"x"', "{", "", "[" * 100_000, '{"model_type": 3}', '{"model_type": "a\\nb"}', "{}"]
)
def test_a_config_of_another_shape_is_refused(sharded: Path, content: str) -> None:
    (sharded / "config.json").write_text(content)
    assert str(sharded / "config.json") in refused(sharded)


@pytest.mark.parametrize("value", ["fp8", 8, ["x"], {"quant_method": ["x"]}, {"quant_method": "a\nb"}, {"bits": 8}])
def test_a_quantization_of_any_shape_that_no_tensor_has_is_a_remark(sharded: Path, value: object) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    (remark,) = Checkpoint.open(sharded).remarks
    assert "a quantization (quantization_config: unknown), but no tensor is quantized" in remark
    assert remark.isprintable()


def test_no_tensors_at_all(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    for file in sharded.glob("*.safetensors"):
        write(file, {}, b"")
    assert "hold no tensors" in refused(sharded)


# The config against the tensors


def reconfigured(model: Path, target: Path, **changes: Any) -> Model:
    """The checkpoint with changes to its config."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return Model.open(target)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 10**9}, "says num_experts 1000000000"),
        ({"num_experts": -8}, "says num_experts -8"),
        ({"num_experts": 16}, r"has 8 experts, but config\.json says 16: .* has no tensor model\.layers\.0\.mlp\.experts\.8"),
        ({"num_experts": 4}, r"has model\.layers\.0\.mlp\.experts\.4\.down_proj\.weight, but .* 4 experts"),
        ({"num_experts": [8, 6]}, r"says num_experts \[8, 6\], but one number for all layers is expected"),
        ({"num_experts_per_tok": 9}, "chooses 9 of 8 experts"),
        ({"num_experts_per_tok": 0}, "says num_experts_per_tok 0"),
        ({"num_hidden_layers": 10**12}, "says num_hidden_layers 1000000000000"),
        ({"num_hidden_layers": 0}, "says num_hidden_layers 0"),
        ({"num_hidden_layers": 3}, r"has no tensor model\.layers\.2\..*, which its config\.json needs"),
        ({"hidden_size": -32}, "says hidden_size -32"),
        ({"hidden_size": 2**40}, "says hidden_size"),
        ({"hidden_size": 64}, "has 8 experts of 32 x 48, 36864 weights, but .* needs 73728"),
        ({"intermediate_size": 64}, "has 8 experts of 32 x 48, 36864 weights, but .* needs 49152"),
        ({"num_key_value_heads": 4}, r"has shape \[16, 32\], but its config\.json needs \[32, 32\]"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 64}, r"has shape \[128, 32\], but its config.json needs \[64, 32\]"),
        ({"num_attention_heads": 0}, "says num_attention_heads 0"),
        ({"num_attention_heads": 5}, "config.json"),
        ({"hidden_act": "import os"}, "import os"),
        ({"dtype": "no such"}, "is not a valid olmoe config"),
        ({"rope_parameters": "x"}, "config.json"),
        ({"rope_parameters": {"rope_type": "no such"}}, "config.json"),
        ({"max_position_embeddings": "many"}, "config.json"),
    ],
)
def test_a_config_that_its_tensors_do_not_bear_out_is_refused(
    model: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        meta_model(reconfigured(model, tmp_path / "model", **change))
    one_sentence(caught.value)


def test_experts_of_unequal_shapes_are_refused_before_any_is_read(model: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=rf"{name} of .* has shape \[32, 48\], but \[48, 32\] is expected of each of 8 equal experts"
    ):
        Model.open(directory)


def test_nothing_but_the_checked_tensors_is_loaded(model: Path, tmp_path: Path) -> None:
    """Things that transformers would load instead: an adapter's base model, a distributed checkpoint, a kernel, remote code."""
    expected = load_model(Model.open(model)).state_dict()
    hostile = {"auto_map": {"AutoModelForCausalLM": "trap.Model"}, "transformers_weights": "other.safetensors"}
    checkpoint = reconfigured(model, tmp_path / "model", **hostile, _attn_implementation="some/kernel", attn_implementation="a/b")
    (checkpoint.path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/where", "peft_type": "LORA"}')
    (checkpoint.path / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    (checkpoint.path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    (checkpoint.path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    loaded = load_model(Model.open(checkpoint.path))
    assert all(torch.equal(values, expected[name]) for name, values in loaded.state_dict().items())
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    assert not (tmp_path / "sprung").exists()


def test_a_family_that_needs_code_of_its_own_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"new_moe \(it needs its own code, auto_map, which is never run\)"):
        reconfigured(model, tmp_path / "model", model_type="new_moe", auto_map={"AutoModelForCausalLM": "m.Model"})


# Values


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_finds_what_is_not_finite(dtype: str, value: float) -> None:
    kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    limits = ml_dtypes.finfo(kind)
    for values in ([0.0, -0.0, float(limits.max), float(limits.min), float(limits.tiny)], [-1.0], [1.0], []):
        assert all_finite(np.array(values, kind), dtype)
        assert not all_finite(np.array([*values, value], kind), dtype)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.5.up_proj.weight"])
def test_a_weight_that_is_not_finite_is_named_where_it_is_read(sharded: Path, name: str) -> None:
    file = sharded / json.loads((sharded / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(sharded)
    with pytest.raises(UserError, match=f"{name} in {file} has a weight that is not finite"):
        checkpoint.read(name)
    with pytest.raises(UserError, match=f"{name} in {file} has a weight that is not finite"):
        load_model(Model.open(sharded))
    with pytest.raises(UserError, match="not finite"):
        checkpoint.read_row(name, checkpoint.shape(name)[0] - 1)


def test_a_number_beside_the_weights_is_no_hindrance(model: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"steps": torch.tensor(3)}, directory / "model.safetensors", metadata={"format": "pt"})
    assert "steps" not in load_model(Model.open(directory)).state_dict()


# Nothing is unpickled


class Trap:
    """If it is opened with pickle, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.file,)


def pickled(directory: Path, names: list[str]) -> Path:
    """The checkpoint with its tensors distributed over pickled files."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for number, name in enumerate(names):
        torch.save(dict(list(tensors.items())[number :: len(names)]), directory / name)
    return directory


@pytest.mark.parametrize("names", [["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], ["weights.pt"]])
def test_pickled_weights_are_refused_with_a_command_that_converts_them(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, names: list[str]
) -> None:
    original = Checkpoint.open(tiny_checkpoint("olmoe"))
    directory = pickled(Path(shutil.copytree(original.path, tmp_path / "it's a model")), names)
    message = refused(directory)
    assert "which are pickled and never opened here" in message
    command = shlex.split(message.partition("convert them with ")[2])
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})
    converted = Checkpoint.open(directory)
    assert converted.names == original.names
    for name in original.names:
        np.testing.assert_array_equal(converted.read(name), original.read(name))


def test_the_conversion_runs_no_code(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint("olmoe"), tmp_path / "model"))
    (directory / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1), "b": Trap(tmp_path / "sprung")}, directory / "pytorch_model.bin")
    command = shlex.split(refused(directory).partition("convert them with ")[2])
    with pytest.raises(pickle.UnpicklingError):
        exec(command[2], {})
    assert not (tmp_path / "sprung").exists()
