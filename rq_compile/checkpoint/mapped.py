"""Many tensors of a checkpoint at once, for transformers: mapped from their files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from rq_compile.checkpoint.safetensors_file import check_finite
from rq_compile.errors import UserError

if TYPE_CHECKING:
    from rq_compile.checkpoint.checkpoint import Checkpoint


def mapped(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors ``names``, in their stored dtypes; nothing is copied.

    Raises:
        UserError: a file cannot be read, or a weight is not finite.
    """
    stored = {name: checkpoint.stored(name) for name in names}
    try:
        files = {file: safe_open(file, "pt") for file in checkpoint.files}
        tensors = {name: files[tensor.file].get_tensor(name) for name, tensor in stored.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights of {checkpoint.path}: {error}; check the files' permissions", 2) from error
    for name, tensor in stored.items():
        check_finite(name, tensor, tensors[name].reshape(-1).view(torch.uint8).numpy())
    return tensors
