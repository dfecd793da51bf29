"""Families whose code is not in transformers, composed of transformers modules that compute the same.

- ``llama_moe`` (LLaMA-MoE-v1, arXiv 2406.16554): Mixtral whose router is a two-layer network with tanh between; the softmax
  over the chosen logits equals Mixtral's renormalised softmax, and the gates are multiplied by ``score_scale_factor``.
- ``deepseek`` (DeepSeek-MoE, arXiv 2401.06066): Qwen2-MoE without QKV biases, whose shared experts are not gated.

Both are for inference only, without the routers' training noise and balance losses.
"""

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeExperts,
    Qwen2MoeMLP,
    Qwen2MoeSparseMoeBlock,
    Qwen2MoeTopKRouter,
)


class LlamaMoeRouter(MixtralTopKRouter):
    """Maps ``x [T, hidden]`` to ``(logits [T, m], gates [T, k], expert ids [T, k])``.

    It is a subclass of Mixtral's router, so that code that finds routers by their class finds it.
    """

    def __init__(self, config: MixtralConfig) -> None:
        nn.Module.__init__(self)
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.score_scale_factor = getattr(config, "score_scale_factor", 1.0)
        self.gate_network = nn.Sequential(
            nn.Linear(self.hidden_dim, self.num_experts, bias=False),
            nn.Tanh(),
            nn.Linear(self.num_experts, self.num_experts, bias=False),
        )

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.gate_network(hidden_states.reshape(-1, self.hidden_dim))
        chosen, experts = torch.topk(logits, self.top_k, dim=-1)
        return logits, torch.softmax(chosen.float(), dim=-1) * self.score_scale_factor, experts


class ComposedModel(PreTrainedModel):
    """transformers searches a class's own source file for features that it can switch. The modules used here are in other
    files."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


class LlamaMoeForCausalLM(ComposedModel, MixtralForCausalLM):
    """LLaMA-MoE-v1 from a ``MixtralConfig`` with ``score_scale_factor``."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.gate = LlamaMoeRouter(config)


class DeepseekMoeBlock(nn.Module):
    """Routed experts plus shared experts that process every token: maps ``x [batch, sequence, hidden]`` to the same shape."""

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__()
        self.gate = Qwen2MoeTopKRouter(config)
        self.experts = Qwen2MoeExperts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_experts = Qwen2MoeMLP(config, intermediate_size=shared) if shared else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates, experts = self.gate(tokens)
        routed = self.experts(tokens, experts, gates).reshape(hidden_states.shape)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class DeepseekForCausalLM(ComposedModel, Qwen2MoeForCausalLM):
    """DeepSeek-MoE 16B from a ``Qwen2MoeConfig``."""

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            if isinstance(layer.mlp, Qwen2MoeSparseMoeBlock):
                layer.mlp = DeepseekMoeBlock(config)


REMOTE_CLASSES: dict[str, type[PreTrainedModel]] = {"llama_moe": LlamaMoeForCausalLM, "deepseek": DeepseekForCausalLM}
