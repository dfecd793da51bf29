"""The activations of an expert in standard ops. ``ExpertGeometry`` defines them."""

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.architectures.geometry import GATED, ExpertGeometry
from rq_compile.rewrite.ops import Ops


def activated(op: Ops, up: gs.Tensor, geometry: ExpertGeometry) -> gs.Tensor:
    """fp32 ``[..., intermediate]``, from the up projection's fp32 ``[..., up_rows]``."""
    kind = geometry.activation
    if kind == "relu":
        return op("Relu", up)
    if kind == "relu2":
        kept = op("Relu", up)
        return op("Mul", kept, kept)
    if kind == "gelu":
        return op("Gelu", up)
    assert kind in GATED
    gate, linear = op("Split", up, axis=-1, num_outputs=2, outputs=2)
    if kind == "limited_swiglu":
        gate = op("Min", gate, np.float32(geometry.limit))
        linear = op("Clip", linear, np.float32(-geometry.limit), np.float32(geometry.limit))
        return op("Mul", op("Mul", gate, op("Sigmoid", gate)), linear)
    if kind == "clamped_swiglu":
        gate = op("Min", gate, np.float32(geometry.limit))
        linear = op("Add", op("Clip", linear, np.float32(-geometry.limit), np.float32(geometry.limit)), np.float32(1))
        return op("Mul", linear, op("Mul", gate, op("Sigmoid", op("Mul", gate, np.float32(geometry.alpha)))))
    if kind == "swiglu":
        return op("Mul", op("Mul", gate, op("Sigmoid", gate)), linear)
    return op("Mul", op("Gelu", gate, approximate="tanh" if kind == "geglu_tanh" else "none"), linear)
