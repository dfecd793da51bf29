"""Connects experts that do not use transformers' experts interface to it.

The interface is a function ``experts(hidden [T, hidden], ids [T, k], gates [T, k]) -> [T, hidden]``, which the module's config
names, and flags that say how the weights are stored. The rest of rq-compile only knows experts that use it.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

Eager = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def put_behind_interface(model: PreTrainedModel) -> PreTrainedModel:
    """Rewrite the MoE blocks of ``model`` whose experts do not use the interface, and return it."""
    config = model.config.get_text_config()
    module: Any
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Step3p7Experts":
            _enter(module, config, type(module).forward, is_transposed=False)
        elif kind == "Llama4TextMoe":
            _enter(module.experts, config, _every_expert, is_transposed=True)
            module.forward = MethodType(_llama4_block, module)
        elif kind == "Llama4ForConditionalGeneration":  # reads an output that its language model does not have
            module.language_model.register_forward_hook(_without_images)
    return model


def _enter(experts: Any, config: Any, eager: Eager, *, is_transposed: bool) -> None:
    experts.config = config
    experts.has_gate, experts.has_bias, experts.has_post_expert_norm = True, False, False
    experts.is_transposed, experts.is_concatenated = is_transposed, True
    experts._is_expert_parallel = False
    if not hasattr(experts, "_apply_gate"):
        experts._apply_gate = MethodType(_gated, experts)

    def forward(self: Any, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return ALL_EXPERTS_FUNCTIONS.get_interface(self.config._experts_implementation, eager)(self, hidden, ids, gates)

    experts.forward = MethodType(forward, experts)


def _gated(experts: Any, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def _without_images(module: nn.Module, args: Any, outputs: Any) -> None:
    outputs.image_outputs = None


def _every_expert(experts: Any, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Llama 4's own forward, which gives every token to every expert; then the outputs of the chosen experts."""
    count = experts.gate_up_proj.shape[0]
    outputs = type(experts).forward(experts, hidden.repeat(count, 1)).view(count, *hidden.shape)
    chosen = outputs[ids, torch.arange(len(hidden), device=hidden.device)[:, None]]
    return (chosen * gates[..., None]).sum(dim=1)


def _llama4_block(block: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama 4 scales the input of an expert, not its output. Each choice of a token is therefore a row of its own with gate 1."""
    hidden = hidden_states.reshape(-1, block.hidden_dim)
    logits = nn.functional.linear(hidden, block.router.weight)
    chosen, ids = torch.topk(logits, block.top_k, dim=1)
    rows = (hidden[:, None] * torch.sigmoid(chosen.float()).to(hidden.dtype)[..., None]).reshape(-1, block.hidden_dim)
    ids = ids.reshape(-1, 1)
    routed = block.experts(rows, ids, torch.ones_like(ids, dtype=rows.dtype))
    return block.shared_expert(hidden) + routed.reshape(-1, block.top_k, block.hidden_dim).sum(dim=1), logits
