"""Switch Transformers routes outside transformers' experts interface, and drops tokens beyond an expert's capacity."""

import torch
from torch import nn
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts


def is_switch(experts: nn.Module) -> bool:
    return isinstance(experts, SwitchTransformersExperts)


def switch_routing(
    hidden: torch.Tensor, dispatch: torch.Tensor, gates: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the router's input and outputs to the fields of ``Routing``, with k = 1.

    ``hidden [batch, sequence, hidden]``; ``dispatch [batch, sequence, m]`` is one-hot, all zeros where a token came after
    ``expert_capacity`` others of its sequence had chosen its expert; ``gates [batch, sequence, 1]``; ``logits [batch,
    sequence, m]``. A dropped token keeps its choice, with a gate of 0: an engine computes it and adds nothing.
    """
    ids = torch.softmax(logits, dim=-1).argmax(dim=-1).reshape(-1, 1)
    dropped = dispatch.sum(dim=-1).reshape(-1, 1) == 0
    return hidden.reshape(-1, hidden.shape[-1]), ids, gates.reshape(-1, 1).masked_fill(dropped, 0.0), dropped
