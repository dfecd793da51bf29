"""Shards, their index, two sets of weights, and folders that are no checkpoint. A model that opens has the logits that
transformers computes from the same folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from changed_checkpoints import opened, refused, sharded
from hostile import INDEX

from rq_compile.architectures.model import Model


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
