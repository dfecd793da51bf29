"""Networks for TensorRT return the logits of the last token; tests need those of all tokens."""

from pathlib import Path

import numpy as np
import onnx

from rq_compile.rewrite.logits_to_keep import FIRST_ROW


def with_all_rows(network: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``network`` whose logits are those of every token."""
    made = onnx.ModelProto()
    made.CopyFrom(network)
    (first,) = (tensor for tensor in made.graph.initializer if tensor.name == FIRST_ROW)
    first.CopyFrom(onnx.numpy_helper.from_array(np.array([0]), FIRST_ROW))
    (logits,) = (value for value in made.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence"
    return made


def all_rows(network: Path) -> Path:
    """Such a copy beside ``network``, with the same weights."""
    path = network.with_name(f"all-rows-{network.name}")
    onnx.save(with_all_rows(onnx.load(network, load_external_data=False)), path)
    return path
