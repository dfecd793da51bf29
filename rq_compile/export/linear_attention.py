"""Layers without softmax attention as one node each: com.microsoft's ``LinearAttention``, which ONNX Runtime computes.

transformers' reference functions of the gated delta rule (Qwen3-Next, arXiv 2412.06464; Kimi Linear, arXiv 2510.26692) and of
Mamba-2's scan (arXiv 2405.21060) loop over chunks of the sequence, which would fix its length in a traced graph. While a model
is traced they are replaced by one op that stands for the whole sequence. States go in and out as fp32
``[batch, heads, key dimension, value dimension]``.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnxscript
import torch
from onnx.defs import OpSchema
from torch import nn
from torch.nn import functional as F
from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE

Result = tuple[torch.Tensor, torch.Tensor]


@torch.library.custom_op("rq_moe::linear_attention", mutates_args=())
def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    heads: int,
    scale: float,
    rule: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("rq_moe::linear_attention stands for a layer in a traced graph; it computes nothing")


@linear_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    heads: int,
    scale: float,
    rule: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2]), torch.empty_like(state)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``query``, ``key [batch, sequence, key heads, dk]``, ``value [batch, sequence, heads, dv]``, ``g`` (log of the decay, per
    head or per key dimension) and ``beta [batch, sequence, heads]``; state ``[batch, heads, dk, dv]``."""
    batch, _, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[-2:]
    dtype = query.dtype
    query, key, value, g, beta = (tensor.float() for tensor in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = _l2_normalized(query), _l2_normalized(key)
    if key_heads != heads:
        query, key = (tensor.repeat_interleave(heads // key_heads, dim=2) for tensor in (query, key))
    state = _state(initial_state, query, (batch, heads, key_dim, value_dim))
    flat = [_flat(tensor) for tensor in (query, key, value)]
    y, state = linear_attention(*flat, state, _flat(g), _flat(beta), heads, key_dim**-0.5, "gated_delta")
    return y.reshape(*y.shape[:2], heads, value_dim).to(dtype), state if output_final_state else None


def mamba2_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> torch.Tensor | Result:
    """``hidden_states [batch, sequence, heads, p]``, ``dt [batch, sequence, heads]``, ``A``, ``D [heads]``, ``B``, ``C``
    ``[batch, sequence, groups, n]``; state ``[batch, heads, p, n]``."""
    batch, _, heads, width = hidden_states.shape
    groups, state_size = B.shape[2:]
    x = hidden_states.float()
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).float()
    B, C = (tensor.float().repeat_interleave(heads // groups, dim=2) for tensor in (B, C))
    state = _state(initial_states, x, (batch, heads, width, state_size)).transpose(2, 3)
    flat = [_flat(tensor) for tensor in (C, B, x * dt[..., None])]
    y, state = linear_attention(*flat, state, A.float() * dt, dt, heads, 1.0, "gated")
    y = y.reshape(*y.shape[:2], heads, width)
    if D is not None:
        y = y + D[..., None] * x
    return (y, state.transpose(2, 3)) if return_final_states else y


# What transformers calls its reference functions.
REPLACED: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "mamba2_chunk_scan": mamba2_scan,
}


@contextmanager
def linear_attention_as_nodes(model: nn.Module) -> Iterator[None]:
    """The modules of ``model`` call the op in place of transformers' reference functions."""
    kept = []
    for source in {sys.modules[type(module).__module__] for module in model.modules()}:
        for name, replacement in REPLACED.items():
            if hasattr(source, name):
                kept.append((source, name, getattr(source, name)))
                setattr(source, name, replacement)
    try:
        yield
    finally:
        for source, name, function in kept:
            setattr(source, name, function)


def _l2_normalized(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], x.shape[1], -1)


def _state(given: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if given is None:
        return like.new_zeros(shape)
    for dimension, size in enumerate(shape):
        torch._check(given.shape[dimension] == size)
    return given.float()


_OPSET = onnxscript.values.Opset("com.microsoft", 1)


def _translation(
    query: onnxscript.FLOAT,
    key: onnxscript.FLOAT,
    value: onnxscript.FLOAT,
    state: onnxscript.FLOAT,
    decay: onnxscript.FLOAT,
    beta: onnxscript.FLOAT,
    heads: int,
    scale: float,
    rule: str,
) -> Any:
    inputs = (query, key, value, state, decay) if rule == "gated" else (query, key, value, state, decay, beta)
    return _OPSET.LinearAttention(*inputs, q_num_heads=heads, kv_num_heads=heads, scale=scale, update_rule=rule, _outputs=2)


def _register() -> None:
    """Register the op with torch's ONNX exporter and with onnx, which checks the traced graph; once per process, on import."""
    tensor, attribute = OpSchema.FormalParameter, OpSchema.Attribute
    optional = OpSchema.FormalParameterOption.Optional
    onnx.defs.register_schema(
        OpSchema(
            "LinearAttention",
            "com.microsoft",
            1,
            doc="ONNX Runtime's op, declared for onnx.",
            inputs=[
                *(tensor(name, "T") for name in ("query", "key", "value", "past_state", "decay")),
                tensor("beta", "T", param_option=optional),
            ],
            outputs=[tensor("output", "T"), tensor("present_state", "T")],
            type_constraints=[("T", ["tensor(float)"], "fp32")],
            attributes=[
                *(attribute(name, OpSchema.AttrType.INT, required=False) for name in ("q_num_heads", "kv_num_heads")),
                attribute("scale", OpSchema.AttrType.FLOAT, required=False),
                attribute("update_rule", OpSchema.AttrType.STRING, required=False),
            ],
        )
    )
    # The exporter has no public way to add a translation.
    _ONNX_TRANSLATION_TABLE[torch.ops.rq_moe.linear_attention.default] = _translation


_register()
