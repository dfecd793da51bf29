"""Many weights of a checkpoint at once, for transformers: mapped from their files, or decoded if they are quantized."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from rq_compile.checkpoint.safetensors_file import check_finite
from rq_compile.checkpoint.storage.weight import BF16, Plain, Weight
from rq_compile.errors import UserError, reason
from rq_compile.file_systems import readable

if TYPE_CHECKING:
    from rq_compile.checkpoint.checkpoint import Checkpoint


def mapped(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The weights ``names``, in the dtypes that they are read in. Weights that are not quantized are not copied.

    Raises:
        UserError: a file cannot be read, or a weight is not finite.
    """
    try:
        with ExitStack() as stack:
            files = {file: safe_open(_utf8_name(file, stack), "pt") for file in checkpoint.files}
            return {name: _tensor(checkpoint.weight(name), files) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read the weights of {checkpoint.path}: {reason(error)}; check the files' permissions", 2
        ) from error


def _tensor(weight: Weight, files: dict[Path, Any]) -> torch.Tensor:
    if not isinstance(weight, Plain):
        values = np.ascontiguousarray(weight.read())
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16) if values.dtype == BF16 else torch.from_numpy(values)
    tensor = files[weight.stored.file].get_tensor(weight.name)
    check_finite(weight.name, weight.stored, tensor.reshape(-1).view(torch.uint8).numpy())
    return tensor


def _utf8_name(file: Path, stack: ExitStack) -> str:
    """A UTF-8 name of ``file`` while ``stack`` is open. safetensors does not accept other names."""
    if readable(str(file)) == str(file):
        return str(file)
    return f"/proc/self/fd/{stack.enter_context(file.open('rb')).fileno()}"
