"""A model with one MoeLayer node (plugins/tensorrt/README.md lists its inputs) for ONNX Runtime."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

OF_TOKENS = 3  # x, ids and gates


def model_of(
    arrays: Sequence[np.ndarray], *, shapes: bool = True, through_fp32: bool = False, **attributes: Any
) -> onnx.ModelProto:
    """``arrays``: the node's inputs, in order. Those that do not depend on tokens become constants or, without ``shapes``, inputs
    of which the graph only states the rank. ``through_fp32``: x and the output are fp32, with casts around the node."""
    inputs, constants = [], []
    names = [f"input{place}" for place in range(len(arrays))]
    for place, (name, array) in enumerate(zip(names, arrays, strict=True)):
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        if place >= OF_TOKENS and shapes:
            constants.append(helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True))
            continue
        known = ["T", *array.shape[1:]] if place < OF_TOKENS and shapes else [None] * array.ndim
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT if through_fp32 and place == 0 else kind, known))
    half = helper.np_dtype_to_tensor_dtype(arrays[0].dtype)
    node = helper.make_node("MoeLayer", names, ["made"], domain="rq.moe")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    # The shape of the output comes from the op's own shape inference.
    nodes, output = [node, helper.make_node("Identity", ["made"], ["out"])], half
    if through_fp32:
        node.input[0], output = "x", TensorProto.FLOAT
        nodes = [
            helper.make_node("Cast", ["input0"], ["x"], to=half),
            node,
            helper.make_node("Cast", ["made"], ["out"], to=TensorProto.FLOAT),
        ]
    graph = helper.make_graph(nodes, "layer", inputs, [helper.make_tensor_value_info("out", output, None)], constants)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("rq.moe", 2)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def session_of(model: onnx.ModelProto, library: str, provider: str = "CPUExecutionProvider") -> onnxruntime.InferenceSession:
    """A session of ``model``. ``library``: the op library to register."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])


def feeds_of(session: onnxruntime.InferenceSession, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    wanted = {graph_input.name for graph_input in session.get_inputs()}
    return {f"input{place}": array for place, array in enumerate(arrays) if f"input{place}" in wanted}
