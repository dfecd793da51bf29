"""One op for layers without softmax attention: com.microsoft's ``LinearAttention``, which ONNX Runtime computes.

One node computes a linear recurrence over a whole sequence. ``recurrent_layers.py`` expresses the layers of models by it.
"""

from typing import Any

import onnx
import onnxscript
import torch
from onnx.defs import OpSchema
from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE


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
    """The outputs ``scale q S [batch, sequence, heads * dv]`` and the last state ``S [batch, heads, dk, dv]``.

    Takes ``query``, ``key [batch, sequence, heads * dk]``, ``value [batch, sequence, heads * dv]`` and the first ``state``.

    ``decay`` (its logarithm) is per head, ``[batch, sequence, heads]``, or per key dimension, ``[batch, sequence, heads * dk]``;
    ``beta`` is per head. The rule "gated" is ``S = exp(decay) S + k v``. "gated_delta" first subtracts from ``v`` the value that
    ``S`` holds for ``k``, and multiplies the difference by ``beta``.
    """
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
