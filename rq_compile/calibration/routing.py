"""Observes the routing of a model: the inputs of a layer's experts, for every family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rq_compile.architectures.layers import MoeLayer
from rq_compile.calibration.switch import is_switch, switch_routing


@dataclass(frozen=True)
class Routing:
    """One call of a layer's experts on T tokens, including padding, with one batch row after another.

    ``hidden [T, hidden]`` fp32. ``ids [T, k]`` int64: the experts that the router chose. ``gates [T, k]`` fp32: the factors of
    their outputs. ``dropped [T, k]`` bool: the choices that the model does not compute (their gate is 0), or None.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    gates: torch.Tensor
    dropped: torch.Tensor | None = None


def watch(model: nn.Module, layer: MoeLayer, receive: Callable[[Routing], None]) -> RemovableHandle:
    """Pass every call of ``layer``'s experts in ``model`` to ``receive`` before it is computed, until the handle is removed."""
    experts = model.get_submodule(layer.name)

    def before_experts(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        receive(Routing(*inputs))

    def after_router(module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        receive(Routing(*switch_routing(*inputs, *outputs)))

    if is_switch(experts):
        # The experts get only the choices that were not dropped; the router's logits show the choice of every token.
        return model.get_submodule(layer.name.replace(".experts", ".router")).register_forward_hook(after_router)
    return experts.register_forward_pre_hook(before_experts)
