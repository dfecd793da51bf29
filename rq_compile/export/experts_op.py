"""The op ``rq.moe::Experts`` in torch: traced in place of a layer's experts, and exported as one ONNX node per MoE layer.

A node takes ``x [T, hidden]``, expert ids int64 ``[T, k]`` and gates ``[T, k]``. Its attribute ``layer`` names the experts
module, by which the rewrite finds the layer's plan and weights. The node has no weights.
"""

from collections.abc import Iterable
from typing import Any

import onnx
import onnxscript
import torch
from onnx.defs import OpSchema
from transformers import PreTrainedModel
from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.traced import set_experts_implementation

IMPLEMENTATION = "rq_compile_experts_node"
DOMAIN = "rq.moe"


@torch.library.custom_op("rq_moe::experts", mutates_args=())
def experts(x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, layer: str) -> torch.Tensor:
    raise NotImplementedError("rq_moe::experts stands for a layer in a traced graph; it does not compute anything")


@experts.register_fake
def _(x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, layer: str) -> torch.Tensor:
    return torch.empty_like(x)


def route_to_experts_nodes(model: PreTrainedModel, layers: Iterable[MoeLayer]) -> None:
    """Make ``model`` call the op in place of its experts. Its family must use transformers' experts interface."""
    for layer in layers:
        module: Any = model.get_submodule(layer.name)
        module.rq_layer = layer.name
    set_experts_implementation(model, IMPLEMENTATION)


def _interface(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    return experts(hidden_states, top_k_index, top_k_weights, module.rq_layer)


_OPSET = onnxscript.values.Opset(DOMAIN, 1)


def _translation(x: onnxscript.FLOAT, ids: onnxscript.INT64, gates: onnxscript.FLOAT, layer: str) -> onnxscript.FLOAT:
    return _OPSET.Experts(x, ids, gates, layer=layer)


def _register() -> None:
    """Register the op with torch's ONNX exporter, with onnx and with transformers; once per process, on import."""
    tensor = OpSchema.FormalParameter
    onnx.defs.register_schema(
        OpSchema(
            "Experts",
            DOMAIN,
            1,
            doc="The routed experts of one MoE layer; exists only between export and rewrite.",
            inputs=[tensor("x", "T"), tensor("ids", "tensor(int64)"), tensor("gates", "T")],
            outputs=[tensor("y", "T")],
            type_constraints=[("T", ["tensor(float)"], "fp32")],
            attributes=[OpSchema.Attribute("layer", OpSchema.AttrType.STRING, required=True)],
        )
    )
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _interface)
    # The exporter has no public way to add a translation.
    _ONNX_TRANSLATION_TABLE[torch.ops.rq_moe.experts.default] = _translation


_register()
