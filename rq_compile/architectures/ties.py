"""Experts that tie: among equal scores, the expert with the lower number is always chosen.

ONNX guarantees this for ``TopK``; torch does not guarantee it for ``torch.topk``. If two rows of a router are equal, their logits
should be too, but torch's matrix product and sigmoid may round the last numbers of a row differently from the others.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.architectures.traced import text_body

ROUTERS = ("gate", "router")


def break_ties_by_number(module: PreTrainedModel, layers: Iterable[MoeLayer]) -> None:
    """Make the body of ``module`` choose experts by this rule. Exported models do not need this, because ONNX's ``TopK`` follows
    it."""
    body = text_body(module)
    forward, mode = body.forward, _LowestNumber({layer.geometry.experts for layer in layers})

    def choosing(*arguments: Any, **named: Any) -> Any:
        with mode:
            return forward(*arguments, **named)

    body.forward = choosing


def remarks_on_ties(model: Model) -> list[str]:
    """A sentence if the router of a layer has equal rows, so that its experts tie for every token; otherwise empty.

    Raises:
        UserError: a router's weights cannot be read, or are not finite.
    """
    tied = {layer.index: experts for layer in model.layers if (experts := _equal_experts(model, layer))}
    if not tied:
        return []
    index, experts = next(iter(tied.items()))
    where = f"{len(tied)} of {len(model.layers)} layers (in layer {index}, those of experts {_listed(experts)})"
    return [f"routers have equal rows in {where}: among experts that tie, those with the lowest numbers are chosen"]


class _LowestNumber(TorchFunctionMode):
    """A mode in which ``topk`` is stable, and equal rows of a weight with one row per expert give equal logits and sigmoids."""

    def __init__(self, experts: set[int]) -> None:
        super().__init__()
        self._experts = experts
        self._firsts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._equal: torch.Tensor | None = None  # of the last such weight

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            return _stable_topk(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is torch.nn.functional.linear and result.shape[-1] in self._experts:
            self._equal = self._firsts_of(*args[1:], **kwargs)
        elif func not in (torch.sigmoid, torch.Tensor.sigmoid) or self._equal is None or result.shape[-1] != len(self._equal):
            return result
        return result if self._equal is None else result[..., self._equal]

    def _firsts_of(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        if weight not in self._firsts:
            rows = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
            self._firsts[weight] = _first_of_equal(rows)
        return self._firsts[weight]


def _stable_topk(x: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


def _first_of_equal(rows: torch.Tensor) -> torch.Tensor | None:
    """For each row ``[m, ...]``, the number of the first row that equals it; None if no two rows are equal."""
    distinct, inverse = torch.unique(rows, dim=0, return_inverse=True)
    if len(distinct) == len(rows):
        return None
    numbers = torch.arange(len(rows), device=rows.device)
    firsts = torch.full((len(distinct),), len(rows), device=rows.device).scatter_reduce(0, inverse, numbers, "amin")
    return firsts[inverse]


def _equal_experts(model: Model, layer: MoeLayer) -> list[int]:
    """The first group of experts whose rows are equal in all tensors of the layer's router that have one row per expert."""
    tensors = [model.read(name).astype(np.float32) for name in _router_weights(model, layer)]
    if not tensors:
        return []
    rows = np.concatenate([tensor.reshape(layer.geometry.experts, -1) for tensor in tensors], axis=1)
    _, inverse, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    tied = np.flatnonzero(counts[inverse.ravel()] > 1)
    return np.flatnonzero(inverse.ravel() == inverse.ravel()[tied[0]]).tolist() if len(tied) else []


def _router_weights(model: Model, layer: MoeLayer) -> list[str]:
    """The router's weights with a row per expert. If a router has several products (LLaMA-MoE), only those of the last."""
    block = f"{layer.name.rpartition('.')[0]}."
    inside = [name for name in model.names if name.startswith(block) and name.removeprefix(block).split(".")[0] in ROUTERS]
    rows = {name: model.shape(name) for name in inside if model.shape(name)[:1] == (layer.geometry.experts,)}
    last = max((name for name, shape in rows.items() if len(shape) > 1), default=None)
    return [name for name, shape in rows.items() if len(shape) == 1 or name == last]


def _listed(experts: list[int]) -> str:
    if len(experts) > 4:
        return f"{experts[0]}, {experts[1]} and {len(experts) - 2} more"
    return ", ".join(map(str, experts[:-1])) + f" and {experts[-1]}"
