"""Opening and reading checkpoints, and the messages about broken ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from changed_checkpoints import sharded
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rq_compile.architectures.model import Model
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError

pytestmark = pytest.mark.quick


@pytest.fixture
def copy(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("olmoe"), tmp_path / "copy"))


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint.open(directory)
    assert caught.value.exit_status == 2
    return str(caught.value)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_reads_what_safetensors_reads(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    checkpoint = Checkpoint.open(tiny.build("olmoe", tmp_path / "model", dtype=dtype))
    assert Model.open(checkpoint.path).dtype == name
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert checkpoint.names == sorted(file.keys())
        for tensor in checkpoint.names:
            expected = file.get_tensor(tensor)
            read = checkpoint.read(tensor)
            assert read.dtype == (ml_dtypes.bfloat16 if name == "bf16" else getattr(np, str(dtype).removeprefix("torch.")))
            assert checkpoint.shape(tensor) == read.shape == tuple(expected.shape)
            np.testing.assert_array_equal(read.astype(np.float32), expected.float().numpy())


def test_reads_one_row_and_refuses_one_beyond(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("granitemoe"))
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    np.testing.assert_array_equal(checkpoint.read_row(name, 3), checkpoint.read(name)[3])
    with pytest.raises(UserError, match="no slice 8"):
        checkpoint.read_row(name, 8)


def test_shards_read_like_one_file(copy: Path) -> None:
    whole = Checkpoint.open(copy)
    expected = {name: whole.read(name) for name in whole.names}
    fingerprint = whole.fingerprint
    checkpoint = Checkpoint.open(sharded(copy))
    assert checkpoint.names == sorted(expected)
    assert checkpoint.fingerprint == fingerprint
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), values)


def test_fingerprint_tells_weights_and_config_apart(copy: Path) -> None:
    original = Checkpoint.open(copy).fingerprint
    assert Checkpoint.open(copy).fingerprint == original
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    other_weights = Checkpoint.open(copy).fingerprint
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 3}))
    assert len({original, other_weights, Checkpoint.open(copy).fingerprint}) == 3


def test_says_what_is_missing(copy: Path, tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "nowhere")
    (copy / "model.safetensors").unlink()
    assert "has no .safetensors files" in refused(copy)
    (copy / "config.json").unlink()
    assert "holds a tokenizer" in refused(copy)


def test_names_a_missing_shard(copy: Path) -> None:
    sharded(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no tensor .* lists it in .*model-00002-of-00002\.safetensors, which is missing\)"):
        Model.open(copy)


@pytest.mark.parametrize("kept", [4, 200, -1])
def test_names_a_truncated_shard(copy: Path, kept: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refused(copy)
    assert "model.safetensors is truncated" in message
    assert "download it again" in message


def test_names_a_quantized_tensor_whose_scales_are_missing(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    save_file(tensors | {name: torch.zeros(2, 3, 1, 16, dtype=torch.uint8)}, copy / "model.safetensors")
    assert f"{name} in {copy / 'model.safetensors'} is stored as MXFP4, but its scales" in refused(copy)


def test_names_an_absent_tensor(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    assert "no.such.weight" not in checkpoint
    with pytest.raises(UserError, match=r"no tensor no\.such\.weight"):
        checkpoint.read("no.such.weight")
