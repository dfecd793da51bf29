"""Indexers, which choose the tokens that attention sees, in a form that can be traced with a free length.

GLM-5-Next drops incomplete groups of tokens by a boolean index, whose size depends on the data. Here every group stays, and the
incomplete ones are marked.
"""

from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel


def keep_every_group(model: PreTrainedModel) -> None:
    """Rewrite every indexer of ``model`` that drops groups."""
    module: Any
    for module in model.modules():
        if type(module).__name__ == "Glm5NextTextIndexer":
            module.get_pooled_states = MethodType(_pooled_states, module)


def _pooled_states(self: Any, packed_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups of ``index_kpool`` tokens, counted from the first that is not padding.

    ``packed_states [batch, tokens, 2 * head_dim + 1]``: keys, gate scores and whether the token counts. Returns each group's key
    ``[batch, groups, head_dim]``, its tokens' places ``[batch, groups, index_kpool]`` (-1 for none) and whether it is complete.
    """
    size, (batch, tokens, _) = self.index_kpool, packed_states.shape
    groups = (tokens + size - 1) // size
    counts = packed_states[..., -1] != 0
    first = (counts.long().cumsum(dim=1) == 0).sum(dim=1)
    places = first[:, None] + torch.arange(groups * size, device=first.device)
    inside = places.clamp(max=tokens - 1)
    present = counts.gather(1, inside) & (places < tokens)
    states = packed_states.gather(1, inside[..., None].expand(-1, -1, packed_states.shape[-1]))
    keys, scores, _ = states.reshape(batch, groups, size, -1).split([self.head_dim, self.head_dim, 1], dim=-1)
    present = present.reshape(batch, groups, size)
    scores = (scores.float() + self.index_kpool_compress_ape.float()).masked_fill(~present[..., None], float("-inf"))
    weights = torch.nan_to_num(scores.softmax(dim=2)).to(keys.dtype)
    places = places.reshape(batch, groups, size).masked_fill(~present, -1)
    return (weights * keys).sum(dim=2), places, present.all(dim=-1)
