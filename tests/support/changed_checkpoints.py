"""Tiny checkpoints with changes, and checks that a checkpoint is rejected, or opens as transformers opens it."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import INDEX, one_sentence
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.errors import UserError

Tensors = dict[str, torch.Tensor]


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


def changed(
    source: Path, into: Path, config: Callable[[dict[str, Any]], object], tensors: Callable[[Tensors], object] | None = None
) -> Path:
    """A copy of ``source`` in a new folder of ``into``; ``config`` and ``tensors`` change its settings and tensors in place."""
    folder = Path(shutil.copytree(source, into / f"{source.name}-{len(list(into.iterdir()))}"))
    stated = json.loads((folder / "config.json").read_text())
    config(stated)
    (folder / "config.json").write_text(json.dumps(stated))
    if tensors is not None:
        held = load_file(folder / "model.safetensors")
        tensors(held)
        save_file({name: t.contiguous() for name, t in held.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


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


def refused(folder: Path, *words: str) -> str:
    """Check that opening ``folder`` fails with one sentence that contains all ``words``, and return the sentence."""
    with pytest.raises(UserError) as caught:
        Model.open(folder)
    message = one_sentence(caught.value)
    assert caught.value.exit_status == 2
    assert all(word in message for word in words), message
    assert "ownload" not in message
    return message


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
