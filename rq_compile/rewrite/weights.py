"""Weights that live outside the graph: described now, produced one chunk at a time while the weights file is written."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

LOCATION = "weights"


@dataclass(frozen=True)
class ExternalWeight:
    """One tensor of the weights file. ``chunks()`` yields arrays whose C-order bytes, concatenated, are the tensor's."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def constant(weight: ExternalWeight) -> gs.Constant:
    """A graph constant without data that stands for all of ``weight``."""
    return _reference(weight.name, weight.name, onnx.helper.np_dtype_to_tensor_dtype(weight.dtype), weight.shape, 0)


def slice_of(whole: gs.Constant, index: int, shape: Sequence[int] | None = None) -> gs.Constant:
    """A constant for ``whole[index]``, seen as ``shape``: the same bytes of the weights file, nothing is copied."""
    proto = whole._values.tensor
    inner = tuple(proto.dims[1:])
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize
    return _reference(
        f"{whole.name}.{index}", external_name(proto), proto.data_type, shape or inner, index * math.prod(inner) * itemsize
    )


def _reference(name: str, weight: str, data_type: int, shape: Sequence[int], offset: int) -> gs.Constant:
    proto = onnx.TensorProto(name=name, data_type=data_type, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", LOCATION), ("weight", weight), ("offset", str(offset))):
        proto.external_data.add(key=key, value=value)
    return gs.Constant(name, LazyValues(proto), data_location=onnx.TensorProto.EXTERNAL)


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
