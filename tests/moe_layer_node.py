"""A model of one MoeLayer node (plugins/tensorrt/README.md) to load in ONNX Runtime. Knows neither torch nor this package."""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

TYPES = {
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}
OF_TOKENS = 3


def model_of(arrays, *, type_of_x=None, shapes=True, **attributes):
    """``arrays``: the inputs in order; those without rows for tokens become constants, or, without ``shapes``, inputs of which
    the graph knows the rank alone. ``type_of_x`` is said of x in place of its own."""
    inputs, constants = [], []
    for place, array in enumerate(arrays):
        name, kind = f"input{place}", TYPES[array.dtype]
        if place >= OF_TOKENS and shapes:
            constants.append(helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True))
            continue
        known = ["T", *array.shape[1:]] if place < OF_TOKENS and shapes else [None] * array.ndim
        inputs.append(helper.make_tensor_value_info(name, type_of_x if place == 0 and type_of_x else kind, known))
    node = helper.make_node("MoeLayer", [f"input{place}" for place in range(len(arrays))], ["out"], domain="rq.moe")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    # Its shape is what the op's own inference says.
    copied = helper.make_node("Identity", ["out"], ["copied"])
    output = helper.make_tensor_value_info("copied", type_of_x or TYPES[arrays[0].dtype], None)
    graph = helper.make_graph([node, copied], "layer", inputs, [output], constants)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("rq.moe", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def session_of(model, library):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds_of(session, arrays):
    wanted = {graph_input.name for graph_input in session.get_inputs()}
    return {f"input{place}": array for place, array in enumerate(arrays) if f"input{place}" in wanted}


def arrays_of(formats, tokens=3, hidden=64, intermediate=32, experts=2, top_k=2, block=64, gated=False, bias=False):
    """Zeros and ones of the right types and shapes; as many experts as fit, the first with all other slots."""
    slots = len(formats)
    replicas = np.full((experts, slots), -1, np.int32)
    replicas[0, : slots - experts + 1] = range(slots - experts + 1)
    replicas[1:, 0] = range(slots - experts + 1, slots)
    index = np.zeros(slots, np.int32)
    seen = dict.fromkeys(range(3), 0)
    for slot, format in enumerate(formats):
        index[slot], seen[format] = seen[format], seen[format] + 1
    arrays = [
        np.ones((tokens, hidden), np.float16),
        np.tile(np.arange(top_k), (tokens, 1)).astype(np.int64),
        np.ones((tokens, top_k), np.float32),
        replicas,
        np.array(formats, np.int32),
    ]
    for outputs, columns in ((intermediate * (2 if gated else 1), hidden), (hidden, intermediate)):
        blocks = -(-columns // block)
        arrays.append(index)
        if seen[0]:
            arrays.append(np.zeros((seen[0], outputs, columns), np.float16))
        for format, part in ((1, 1), (2, 2)):
            if seen[format]:
                arrays.append(np.zeros((seen[format], outputs, blocks * block // part), np.int8))
                arrays.append(np.ones((seen[format], outputs, blocks), np.float32))
        if bias:
            arrays.append(np.zeros((slots, outputs), np.float32))
    return arrays
