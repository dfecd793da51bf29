"""A layer compiled to a MoeLayer node, and the node's result in float64, according to plugins/tensorrt/README.md."""

import sys
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from one_layer import one_layer, plan_of, random_experts
from onnx import TensorProto, helper, numpy_helper

sys.path.append(str(Path(__file__).parents[2] / "plugins" / "kernels"))

from rq_kernels import reference
from rq_kernels.activations import GATED
from rq_kernels.launch import Layer, Projection

from rq_compile.architectures.geometry import Activation, ExpertGeometry
from rq_compile.lowerings import Plugins
from rq_compile.targets.tensorrt.network import Precision
from rq_compile.targets.weights_file import locate, write_weights

ROLES = (
    ("float_weights",),
    ("int8_packed", "int8_scales"),
    ("int4_packed", "int4_scales"),
    ("mxfp4_packed", "mxfp4_scales"),
    ("fp8_packed", "fp8_scales"),
    ("int3_packed", "int3_scales"),
    ("int2_packed", "int2_scales"),
)
INT4_ALONE = [(e, "int4") for e in range(4)]
ACTIVATIONS = list(get_args(Activation))
FIRST = ("x", "ids", "gates", "replicas", "formats")


def geometry_of(
    activation: Activation = "swiglu", *, bias: bool = False, hidden: int = 128, intermediate: int = 64
) -> ExpertGeometry:
    return ExpertGeometry(
        experts=4, top_k=2, hidden=hidden, intermediate=intermediate, activation=activation, bias=bias, alpha=1.3, limit=0.9
    )


def compiled_layer(
    geometry: ExpertGeometry, slots: Any, folder: Path, *, experts: Any = None, half: Precision = "fp16", plan: Any = None
) -> tuple[onnx.ModelProto, Any]:
    """The layer's model, complete and checked, and its experts."""
    experts = experts or random_experts(geometry)
    plan = plan or plan_of(geometry, slots)
    lowered = Plugins(half).lower(one_layer(geometry.hidden, 2), plan, lambda _, e: experts[e])
    model, sections = lowered.model, lowered.experts
    with (folder / "layer.data").open("wb") as file:
        written = write_weights(sections, file)
    locate(model, written.starts, "layer.data")
    onnx.save(model, folder / "layer.onnx")
    return onnx.load(folder / "layer.onnx"), experts


def moe_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "MoeLayer" and node.domain == "rq.moe"]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def inputs_of(node: onnx.NodeProto) -> dict[str, str]:
    """Names of the node's inputs by what they are, those of a projection as ``up_index`` or ``down_index``."""
    formats = attributes_of(node)["formats"]
    roles = ["index", *(role for code in range(len(ROLES)) if code in formats for role in ROLES[code])]
    if len(node.input) > len(FIRST) + 2 * len(roles):
        roles.append("bias")
    names = [*FIRST, *(f"{projection}_{role}" for projection in ("up", "down") for role in roles)]
    return dict(zip(names, node.input, strict=True))


def constants_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """All initializers, including those stored in a file."""
    return {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}


def arrays_of(node: onnx.NodeProto, constants: dict[str, np.ndarray], *of_tokens: np.ndarray) -> Any:
    """The node's inputs in their order, as torch tensors; ``of_tokens``: x, ids and gates."""
    arrays = [*of_tokens, *(constants[name] for name in list(node.input)[len(of_tokens) :])]
    return [torch.from_numpy(array.view(np.uint8) if array.dtype == np.int8 else array) for array in arrays]


def exact(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> Any:
    """The layer as ``rq_kernels.reference`` takes it: its weights in float64, unpacked."""
    attributes = attributes_of(node)
    held = {name: constants[tensor] for name, tensor in inputs_of(node).items() if tensor in constants}
    activation = attributes["activation"].decode()
    some_down = next(held[f"down_{role}"] for roles in ROLES for role in roles if f"down_{role}" in held)
    some_up = next(held[f"up_{role}"] for roles in ROLES for role in roles if f"up_{role}" in held)
    hidden, intermediate = some_down.shape[1], some_up.shape[1] // (1 + (activation in GATED))
    formats = attributes["formats"]
    projections, weights = [], []
    for name, columns in (("up", hidden), ("down", intermediate)):
        index, bias = held[f"{name}_index"], held.get(f"{name}_bias")
        parts = [[held.get(f"{name}_{role}") for role in ROLES[code]] for code in range(len(ROLES))]
        slots = zip(formats, index, strict=True)
        exact_slots = [unpacked(format, [part[i] for part in parts[format]], columns) for format, i in slots]
        weights.append(torch.from_numpy(np.stack(exact_slots)))
        projections.append(Projection(torch.from_numpy(index), {}, None if bias is None else torch.from_numpy(bias)))
    codes, replicas = (torch.from_numpy(held[name]) for name in ("formats", "replicas"))
    up, down = projections
    layer = Layer(hidden, intermediate, activation, codes, replicas, up, down, attributes["alpha"], attributes["limit"])
    return reference.Example(layer, weights[0], weights[1])


def unpacked(format: int, parts: Any, columns: int) -> np.ndarray:
    if format == 0:
        return parts[0].astype(np.float64)
    packed, scales = parts
    assert packed.dtype == np.int8
    q, zero = packed.view(np.uint8).astype(np.int64), 128
    if format in (2, 3):
        q, zero = np.stack([q % 16, q // 16], -1).reshape(len(q), -1), 8
    if format == 5:
        blocks = q.reshape(*scales.shape, -1)
        lower, upper = np.split(blocks, [2 * blocks.shape[2] // 3], axis=2)
        eights = lower[..., ::2] + 256 * lower[..., 1::2] + 65536 * upper
        q, zero = np.stack([eights // 8**place % 8 for place in range(8)], -1).reshape(len(q), -1), 4
    if format == 6:
        q, zero = np.stack([q // 4**place % 4 for place in range(4)], -1).reshape(len(q), -1), 2
    numbers, values = (q - zero).astype(np.float64), scales.astype(np.float64)
    if format == 4:
        numbers = packed.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    if format == 3:
        numbers, values = (
            np.concatenate([reference.E2M1, -reference.E2M1])[q],
            np.exp2(scales.view(np.uint8).astype(np.float64) - 127),
        )
    return (numbers * np.repeat(values, q.shape[1] // scales.shape[1], axis=1))[:, :columns]


def evaluated(
    node: onnx.NodeProto, constants: dict[str, np.ndarray], x: np.ndarray, ids: np.ndarray, gates: np.ndarray
) -> np.ndarray:
    """float64 ``[T, hidden]``."""
    tokens, chosen, shares = (torch.from_numpy(np.ascontiguousarray(a)) for a in (x.astype(np.float64), ids, gates))
    return reference.moe_layer(tokens, chosen, shares, exact(node, constants)).numpy()


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs of a compiled model, by name. ONNX Runtime computes it on the CPU, except for its MoeLayer nodes.

    The graph is cut at these nodes. It runs once per node, to get the node's inputs, and once more with the outputs of all nodes.
    """
    nodes, constants = moe_nodes(model), constants_of(model)
    outputs = [value.name for value in model.graph.output]
    cut = onnx.ModelProto.FromString(model.SerializeToString())
    for node in moe_nodes(cut):
        cut.graph.node.remove(node)
    types = dict.fromkeys((name for node in nodes for name in (node.input[0], node.output[0])), TensorProto.FLOAT16)
    for node in nodes:
        types |= {node.input[1]: TensorProto.INT64, node.input[2]: TensorProto.FLOAT}
    for node in nodes:
        cut.graph.input.append(helper.make_tensor_value_info(node.output[0], types[node.output[0]], None))
    for name in dict.fromkeys(name for node in nodes for name in node.input[:3]):
        cut.graph.output.append(helper.make_tensor_value_info(name, types[name], None))
    session = onnxruntime.InferenceSession(cut.SerializeToString(), providers=["CPUExecutionProvider"])
    tokens = feeds["input_ids"].size
    made = {node.output[0]: np.zeros((tokens, exact(node, constants).layer.hidden), np.float16) for node in nodes}
    for node in nodes:
        x, ids, gates = session.run(node.input[:3], feeds | made)
        made[node.output[0]] = evaluated(node, constants, x, ids, gates).astype(np.float16)
    return dict(zip(outputs, session.run(outputs, feeds | made), strict=True))
