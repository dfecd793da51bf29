"""Rotary embeddings written so that they can be traced, and so that the length of the sequence stays free in the graph.

transformers chooses their frequencies with Python's ``if``, or keeps them in a buffer between calls. Here they are computed only
from the positions of each call, which gives the same result as transformers in a model that has not run a longer sequence before.
"""

from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

Rotary = Any  # every family has its own module; their attributes are the same


def free_the_length(model: PreTrainedModel) -> None:
    """Rewrite every rotary embedding of ``model`` whose frequencies or scaling depend on the length."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(module, PhimoeRotaryEmbedding):
            if kind != "default":
                module.forward = MethodType(_phimoe, module)
        elif type(module).__name__ == "Llama4TextRotaryEmbedding":
            module.forward = _Complex(module.forward)
        elif kind == "longrope":
            _keep_long_frequencies(module)
            module.forward = MethodType(_longrope, module)
        elif kind == "dynamic":
            module.forward = MethodType(_dynamic, module)


class _Complex:
    """Llama 4's forward, which returns complex frequencies ``[batch, sequence, n]``. Attention adds an axis of heads by indexing,
    which transformers' exporter cannot translate for complex numbers; it translates ``unsqueeze``."""

    def __init__(self, forward: Callable[..., torch.Tensor]) -> None:
        self._forward = forward

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> "_ForHeads":
        return _ForHeads(self._forward(x, position_ids))


class _ForHeads:
    def __init__(self, frequencies: torch.Tensor) -> None:
        self._frequencies = frequencies

    def to(self, device: torch.device) -> "_ForHeads":
        return self

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._frequencies.unsqueeze(2)


def _keep_long_frequencies(module: Rotary) -> None:
    original = module.config.rope_parameters["original_max_position_embeddings"]
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, seq_len=original + 1)
    module.register_buffer("long_inv_freq", long, persistent=False)


def _longrope(self: Rotary, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    original = self.config.rope_parameters["original_max_position_embeddings"]
    long, short = (frequencies.to(x.device) for frequencies in (self.long_inv_freq, self.original_inv_freq))
    return _embedding(self, x, position_ids, torch.where(_length(position_ids) > original, long, short))


def _dynamic(self: Rotary, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    """NTK scaling whose base grows with the length beyond ``max_position_embeddings``."""
    rope, trained = self.config.rope_parameters, self.config.max_position_embeddings
    dimension, factor = 2 * len(self.original_inv_freq), rope["factor"]
    growth = factor * _length(position_ids).clamp(min=trained) / trained - (factor - 1)
    base = rope["rope_theta"] * growth ** (dimension / (dimension - 2))
    exponents = torch.arange(0, dimension, 2, device=x.device).float() / dimension
    return _embedding(self, x, position_ids, 1.0 / base**exponents)


def _phimoe(self: Rotary, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Phi-3.5-MoE: the scale depends on the length; transformers uses the frequencies of short sequences at every length."""
    rope = self.config.rope_parameters
    long = _length(position_ids) > rope["original_max_position_embeddings"]
    scaling = long * (rope["long_mscale"] - rope["short_mscale"]) + rope["short_mscale"]
    angles = position_ids[..., None].float() * self.inv_freq.to(x.device)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)


def _length(position_ids: torch.Tensor) -> torch.Tensor:
    """Number of tokens of the longest sequence so far, a scalar."""
    return position_ids.max() + 1


def _embedding(module: Rotary, x: torch.Tensor, position_ids: torch.Tensor, frequencies: torch.Tensor) -> Any:
    """The result of the module's forward with ``frequencies``, without transformers' update of its buffers."""
    undecorated = type(module).forward.__wrapped__
    return undecorated(SimpleNamespace(inv_freq=frequencies, attention_scaling=module.attention_scaling), x, position_ids)
