"""Tiny checkpoints with changes, and a check that a checkpoint is rejected."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import one_sentence
from safetensors.torch import load_file, save_file

from rq_compile.architectures.model import Model
from rq_compile.errors import UserError

Tensors = dict[str, torch.Tensor]


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


def refused(folder: Path, *words: str) -> str:
    """Check that opening ``folder`` fails with one sentence that contains all ``words``, and return the sentence."""
    with pytest.raises(UserError) as caught:
        Model.open(folder)
    message = one_sentence(caught.value)
    assert caught.value.exit_status == 2
    assert all(word in message for word in words), message
    assert "ownload" not in message
    return message
