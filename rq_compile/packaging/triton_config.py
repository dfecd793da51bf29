"""Writes ``config.pbtxt`` with Triton's own protobuf messages, so that no field can be misspelt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rq_compile.errors import UserError

# Triton's data type of a text.
TEXT = np.dtype(object)


@dataclass(frozen=True)
class Tensor:
    """An input or output. ``dims``: without the batch if the model has one; -1 for variable dimensions."""

    name: str
    dtype: np.dtype
    dims: tuple[int, ...]
    optional: bool = False


def messages() -> Any:
    """The module with ``ModelConfig`` and the messages in it.

    Raises:
        UserError: tritonclient is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise UserError("a Triton package needs tritonclient; run pip install 'tritonclient[grpc]'", 2) from error
    return model_config_pb2


def model_config(name: str, backend: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor], parameters: dict[str, str]) -> Any:
    """A ``ModelConfig`` with these tensors and parameters. The backend's module completes it."""
    config = messages().ModelConfig(name=name, backend=backend)
    for tensor in inputs:
        config.input.add(name=tensor.name, data_type=data_type(tensor.dtype), dims=tensor.dims, optional=tensor.optional)
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=data_type(tensor.dtype), dims=tensor.dims)
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def data_type(dtype: np.dtype) -> int:
    """The number of Triton's data type for ``dtype``."""
    from tritonclient.utils import np_to_triton_dtype

    known = "BF16" if dtype.name == "bfloat16" else np_to_triton_dtype(dtype)
    return messages().DataType.Value("TYPE_STRING" if known == "BYTES" else f"TYPE_{known}")


def as_text(config: Any) -> str:
    """``config`` as the text of a ``config.pbtxt``; the same config gives the same text."""
    from google.protobuf import text_format

    return text_format.MessageToString(config)
