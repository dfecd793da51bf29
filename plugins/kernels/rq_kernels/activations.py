"""The activations of an expert. The activation is an argument, not a variant: a branch in the epilogue saves kernels."""

import triton
import triton.language as tl

NAMES = ("none", "swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "limited_swiglu", "relu", "gelu", "relu2")
GATED = ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "limited_swiglu")

SWIGLU, GEGLU, GEGLU_TANH, CLAMPED_SWIGLU, LIMITED_SWIGLU = (tl.constexpr(NAMES.index(name)) for name in GATED)
RELU, GELU, RELU2 = (tl.constexpr(NAMES.index(name)) for name in ("relu", "gelu", "relu2"))


@triton.jit
def _gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_tanh(x):
    # (1 + tanh(z)) / 2 is sigmoid(2 z).
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gated(gate, linear, activation, alpha, limit):
    """fp32, elementwise. ``alpha`` applies to clamped_swiglu, ``limit`` also to limited_swiglu. NaN stays NaN."""
    if activation == CLAMPED_SWIGLU:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        linear = tl.minimum(linear, limit, propagate_nan=tl.PropagateNan.ALL)
        linear = 1 + tl.maximum(linear, -limit, propagate_nan=tl.PropagateNan.ALL)
        gate = gate * tl.sigmoid(alpha * gate)
    elif activation == LIMITED_SWIGLU:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        linear = tl.minimum(linear, limit, propagate_nan=tl.PropagateNan.ALL)
        linear = tl.maximum(linear, -limit, propagate_nan=tl.PropagateNan.ALL)
        gate = gate * tl.sigmoid(gate)
    elif activation == GEGLU:
        gate = _gelu(gate)
    elif activation == GEGLU_TANH:
        gate = _gelu_tanh(gate)
    else:
        gate = gate * tl.sigmoid(gate)
    return gate * linear


@triton.jit
def plain(x, activation):
    """fp32, elementwise: relu, gelu, the square of relu, or x itself."""
    if activation == RELU:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif activation == GELU:
        x = _gelu(x)
    elif activation == RELU2:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = x * x
    return x
