"""Layers without softmax attention, written with the op ``linear_attention`` while a model is traced.

transformers computes the gated delta rule (Qwen3-Next, arXiv 2412.06464; Kimi Linear, arXiv 2510.26692), the scans of Mamba
(arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060) and lightning attention (MiniMax-01, arXiv 2501.08313) in loops over the
sequence, which would fix its length in a traced graph.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rq_compile.export.linear_attention import linear_attention

Result = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def recurrent_layers_as_nodes(model: nn.Module) -> Iterator[None]:
    """Make the layers of ``model`` call the op instead of transformers' reference functions.

    Mamba's function does not receive the initial state, so a hook on its module records it.
    """
    for module in model.modules():
        if type(module).__name__ == "MiniMaxLightningAttention":
            module.forward = MethodType(_lightning_attention, module)
    begun = BegunStates()
    replaced = {**REPLACED, "mamba_selective_scan": begun.scan}
    sources = {sys.modules[type(module).__module__] for module in model.modules()}
    kept = [(source, name, getattr(source, name)) for source in sources for name in replaced if hasattr(source, name)]
    scanning = {source for source, name, _ in kept if name == "mamba_selective_scan"}
    hooks = [
        module.register_forward_pre_hook(begun.note, with_kwargs=True)
        for module in model.modules()
        if sys.modules[type(module).__module__] in scanning and hasattr(module, "A_log")
    ]
    for source, name, _ in kept:
        setattr(source, name, replaced[name])
    try:
        yield
    finally:
        for source, name, function in kept:
            setattr(source, name, function)
        for hook in hooks:
            hook.remove()


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


class BegunStates:
    """Mamba's scan from the state in the cache. transformers begins with zeros if there is more than one token."""

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None

    def note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_recurrent_state")), None)
        self.state = None if cache is None else cache.get_recurrent_state(module.layer_idx)

    def scan(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | Result:
        """``hidden_states``, ``dt``, ``z [batch, channels, sequence]``, ``A [channels, n]``, ``B``, ``C [batch, n, sequence]``;
        state ``[batch, channels, n]``. Each channel is a head with values of one number."""
        (batch, channels, _), state_size = hidden_states.shape, A.shape[1]
        dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[:, None]
        dt = (F.softplus(dt) if delta_softplus else dt).float().transpose(1, 2)
        x = hidden_states.float().transpose(1, 2)
        query, key = (tensor.float().transpose(1, 2)[:, :, None].expand(-1, -1, channels, -1) for tensor in (C, B))
        state = _state(self.state, x, (batch, channels, state_size))[..., None]
        y, state = linear_attention(_flat(query), _flat(key), x * dt, state, _flat(dt[..., None] * A), dt, channels, 1.0, "gated")
        y = (y if D is None else y + D * x).transpose(1, 2)
        y = y if z is None else y * F.silu(z)
        return (y, state.squeeze(3)) if return_last_state else y


def _lightning_attention(
    self: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: Any = None, **kwargs: Any
) -> Result:
    """``hidden_states [batch, sequence, hidden]``; a decay that depends on the head alone."""
    batch, length, _ = hidden_states.shape
    heads, size = self.num_attention_heads, self.head_dim
    x = self.act_fn(self.qkv_proj(hidden_states))
    x = x if attention_mask is None else x * attention_mask[:, :, None]
    query, key, value = x.reshape(batch, length, heads, 3 * size).split(size, dim=3)
    state = _state(None if cache is None else cache.get_linear_cache(self.layer_idx), x, (batch, heads, size, size))
    decay = (-self.slope_rate.reshape(heads)).expand(batch, length, heads)
    y, state = linear_attention(_flat(query), _flat(key), _flat(value), state, decay, decay, heads, 1.0, "gated")
    if cache is not None:
        cache.set_linear_cache(self.layer_idx, state)
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * self.norm(y)), state


# What transformers calls its reference functions.
REPLACED: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "mamba2_chunk_scan": mamba2_scan,
}


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
