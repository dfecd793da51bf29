"""Weights that are stored outside the graph: described first, and computed piece by piece while the weights file is written."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from rq_compile.quantization.packing import packed_codes

LOCATION = "weights"
INT4 = np.dtype(ml_dtypes.int4)


@dataclass(frozen=True)
class ExternalWeight:
    """One tensor of the weights file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return stored_bytes(self.dtype, self.shape)


@dataclass(frozen=True, eq=False)
class Piece:
    """The next values of each of ``weights``, which are computed together. ``values()`` returns an array for each, in C order.

    A piece of an int4 weight holds an even number of values, because two share a byte. Pieces are independent of each other and
    may be computed at the same time. ``memory``: approximate bytes that are needed to compute the piece. ``preparation`` is equal
    for pieces for which a process computes the same thing once, in a time that matters; None: there is no such thing.
    """

    weights: tuple[ExternalWeight, ...]
    values: Callable[[], tuple[np.ndarray, ...]]
    memory: int
    preparation: Hashable = None


@dataclass(frozen=True)
class Section:
    """Adjacent weights in the weights file: those of one layer's experts, or a single dense weight.

    The concatenated values of the ``pieces`` of a weight are the weight.
    """

    name: str
    weights: tuple[ExternalWeight, ...]
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return sum(weight.bytes for weight in self.weights)


def stored_bytes(dtype: np.dtype, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes in the weights file."""
    count = math.prod(shape)
    return -(-count // 2) if dtype == INT4 else count * dtype.itemsize


def stored(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """uint8 ``[bytes]``: ``values`` as in the weights file, in C order. Of two int4 values, the first is in the low bits."""
    if dtype != INT4:
        return np.ascontiguousarray(values, dtype).reshape(-1).view(np.uint8)
    return packed_codes(np.ascontiguousarray(values, np.int8).reshape(1, -1).view(np.uint8) & 15, 4)[0]


def constant(weight: ExternalWeight) -> gs.Constant:
    """A graph constant without data that stands for the whole ``weight``."""
    return _reference(weight.name, weight.name, onnx.helper.np_dtype_to_tensor_dtype(weight.dtype), weight.shape, 0)


def slice_of(whole: gs.Constant, index: int, shape: Sequence[int] | None = None) -> gs.Constant:
    """A constant for ``whole[index]`` with ``shape``. It refers to the same bytes of the weights file; nothing is copied."""
    proto = whole._values.tensor
    inner = tuple(proto.dims[1:])
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(proto.data_type))
    return _reference(
        f"{whole.name}.{index}", external_name(proto), proto.data_type, shape or inner, index * stored_bytes(dtype, inner)
    )


def _reference(name: str, weight: str, data_type: int, shape: Sequence[int], offset: int) -> gs.Constant:
    proto = onnx.TensorProto(name=name, data_type=data_type, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", LOCATION), ("weight", weight), ("offset", str(offset))):
        proto.external_data.add(key=key, value=value)
    return gs.Constant(name, LazyValues(proto), data_location=onnx.TensorProto.EXTERNAL)


def external_proto(tensor: gs.Tensor) -> onnx.TensorProto | None:
    """The proto of ``tensor`` in the graph if its data is external; otherwise None."""
    lazy = isinstance(tensor, gs.Constant) and isinstance(tensor._values, LazyValues)
    return tensor._values.tensor if lazy and tensor._values.tensor.data_location == onnx.TensorProto.EXTERNAL else None


def external_name(proto: onnx.TensorProto) -> str:
    """The name of the ExternalWeight that holds this tensor's bytes: its own, unless it is a slice of another."""
    return next((entry.value for entry in proto.external_data if entry.key == "weight"), proto.name)


def external_offset(proto: onnx.TensorProto) -> int:
    """Bytes from the start of the ExternalWeight to this tensor's."""
    return int(next((entry.value for entry in proto.external_data if entry.key == "offset"), "0"))


def external_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every initializer of ``graph`` and its subgraphs whose data is external."""
    yield from (tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from external_tensors(attribute.g)
