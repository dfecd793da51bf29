"""Routing of Switch Transformers, which does not use transformers' experts interface and drops tokens beyond a capacity."""

import torch
from torch import nn
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts


def is_switch(experts: nn.Module) -> bool:
    return isinstance(experts, SwitchTransformersExperts)


def switch_routing(
    hidden: torch.Tensor, dispatch: torch.Tensor, gates: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of ``Routing`` from the router's input and outputs, with k = 1.

    ``hidden [batch, sequence, hidden]``; ``gates [batch, sequence, 1]``; ``logits [batch, sequence, m]``. ``dispatch [batch,
    sequence, m]`` is one-hot, or all zeros if ``expert_capacity`` earlier tokens of the sequence had already chosen the expert. A
    dropped token keeps its choice, with a gate of 0: an engine computes it and adds nothing.
    """
    ids = torch.softmax(logits, dim=-1).argmax(dim=-1).reshape(-1, 1)
    dropped = dispatch.sum(dim=-1).reshape(-1, 1) == 0
    return hidden.reshape(-1, hidden.shape[-1]), ids, gates.reshape(-1, 1).masked_fill(dropped, 0.0), dropped
