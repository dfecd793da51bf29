"""The activations of experts in torch. ``rewrite/activations.py`` has them in ONNX, and ``plugins/`` in kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from rq_compile.architectures.geometry import GATED, Activation, ExpertGeometry

Parameter = Literal["alpha", "limit"]
# Functions of gate, up (equal to gate if the activation is not gated), alpha and limit.
Function = Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]


@dataclass(frozen=True)
class ActivationFunction:
    """``parameters``: the fields of ``ExpertGeometry`` that the function depends on."""

    function: Function
    parameters: tuple[Parameter, ...] = ()


def _clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


ACTIVATIONS: dict[Activation, ActivationFunction] = {
    "swiglu": ActivationFunction(lambda gate, up, alpha, limit: F.silu(gate) * up),
    "geglu": ActivationFunction(lambda gate, up, alpha, limit: F.gelu(gate) * up),
    "geglu_tanh": ActivationFunction(lambda gate, up, alpha, limit: F.gelu(gate, approximate="tanh") * up),
    "limited_swiglu": ActivationFunction(
        lambda gate, up, alpha, limit: F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit), ("limit",)
    ),
    "clamped_swiglu": ActivationFunction(_clamped_swiglu, ("alpha", "limit")),
    "relu": ActivationFunction(lambda gate, up, alpha, limit: F.relu(gate)),
    "gelu": ActivationFunction(lambda gate, up, alpha, limit: F.gelu(gate)),
    "relu2": ActivationFunction(lambda gate, up, alpha, limit: F.relu(gate).square()),
}


def activate(rows: torch.Tensor, geometry: ExpertGeometry) -> torch.Tensor:
    """The input of the down projection ``[n, intermediate]``, from up-projected ``rows [n, F]``: see ``ExpertGeometry``."""
    gate, up = rows.chunk(2, dim=-1) if geometry.activation in GATED else (rows, rows)
    return ACTIVATIONS[geometry.activation].function(gate, up, geometry.alpha, geometry.limit)
