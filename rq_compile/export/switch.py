"""Switch Transformers, which does not use transformers' experts interface: its sparse block, rewritten for export."""

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rq_compile.architectures.layers import MoeLayer
from rq_compile.export.experts_op import experts


def route_switch_to_experts_nodes(model: PreTrainedModel, layers: Iterable[MoeLayer]) -> None:
    """Make every sparse block of ``model`` call the op ``rq_moe::experts`` in place of its loop over experts."""
    for layer in layers:
        block: Any = model.get_submodule(layer.name.rpartition(".")[0])
        block.rq_layer = layer.name
        block.forward = MethodType(_sparse_block, block)


def _sparse_block(block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Maps ``[batch, sequence, hidden]`` to the same shape, like ``SwitchTransformersSparseMLP``.

    There, a token beyond its expert's capacity (counted per sequence) is dropped. Here, its gate is 0, which gives the same sum.
    """
    router = block.router
    logits = router.classifier(hidden_states.to(router.dtype))
    gates, ids = torch.max(torch.softmax(logits, dim=-1), dim=-1, keepdim=True)
    arrivals = torch.cumsum(nn.functional.one_hot(ids.squeeze(-1), router.num_experts), dim=-2)
    kept = torch.gather(arrivals, -1, ids) <= router.expert_capacity
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    gates = (gates.to(hidden_states.dtype) * kept).reshape(-1, 1)
    return experts(tokens, ids.reshape(-1, 1), gates, block.rq_layer).reshape(hidden_states.shape)
