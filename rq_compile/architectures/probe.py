"""Finds out what an experts module of transformers computes, by running it on small random weights.

Only the class's own forward is reliable: a flag or the name of an activation may be new, or may not describe everything (a norm
after each expert, a scale). Modules that none of our activations reproduces are refused, so that no family is compiled wrongly.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from rq_compile.architectures.activation import ACTIVATIONS, activate
from rq_compile.architectures.geometry import GATED, ExpertGeometry
from rq_compile.errors import UserError, reason

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, CHOICES = 3, 8, 6, 48, 2
TOLERANCE = 1e-4
# The values of GPT-OSS, which its config may leave out.
DEFAULT_ALPHA, DEFAULT_LIMIT = 1.702, 7.0


def experts_geometry(module: Any, name: str, *, experts: int, top_k: int, hidden: int, intermediate: int) -> ExpertGeometry:
    """The geometry of the experts module ``name``, with the activation that reproduces the module's forward.

    Raises:
        UserError: no activation reproduces it.
    """
    small = _miniature(module)
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(TOKENS, HIDDEN, generator=generator)
        * torch.tensor([1.0, 6.0, 40.0, 400.0]).repeat_interleave(TOKENS // 4)[:, None]
    )
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(dim=1)[:, :CHOICES]
    gates = torch.rand(TOKENS, CHOICES, generator=generator)
    kind = f"{name} ({type(module).__name__})"
    try:
        with torch.no_grad():
            expected = small(x, ids, gates)
    except Exception as error:  # a module that needs more than the interface promises
        raise UserError(
            f"{kind} cannot be run on small weights ({reason(error)[:120]}); "
            "it is not supported, use a family of docs/families.md"
        ) from error
    found = next((one for one in _candidates(module) if _equal(_computed(small, one, x, ids, gates), expected)), None)
    if found is None:
        norm = " (it has a norm after each expert)" if getattr(module, "has_post_expert_norm", False) else ""
        raise UserError(
            f"{kind} does not compute experts with {', '.join(ACTIVATIONS)}{norm}; "
            "it is not supported, use a family of docs/families.md"
        )
    sizes = {"experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate}
    return found.model_copy(update=sizes)


def _miniature(module: Any) -> Any:
    """The module with few, small, random experts on the CPU, which runs its class's own forward."""
    small = deepcopy(module)
    generator = torch.Generator().manual_seed(1)
    rows = INTERMEDIATE * (2 if module.has_gate else 1)
    shapes = {"gate_up_proj" if module.has_gate else "up_proj": (rows, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
    for name, (outputs, inputs) in shapes.items():
        shape = (EXPERTS, inputs, outputs) if module.is_transposed else (EXPERTS, outputs, inputs)
        setattr(small, name, nn.Parameter(torch.randn(shape, generator=generator) / inputs**0.5, False))
        if module.has_bias:
            setattr(small, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, outputs, generator=generator), False))
    for name, parameter in list(small.named_parameters()):
        if parameter.is_meta:  # for example, of a norm
            owner, _, attribute = name.rpartition(".")
            setattr(small.get_submodule(owner), attribute, nn.Parameter(torch.ones(HIDDEN), False))
    for attribute, value in (("num_experts", EXPERTS), ("hidden_size", HIDDEN), ("hidden_dim", HIDDEN)):
        if hasattr(small, attribute):
            setattr(small, attribute, value)
    small.config._experts_implementation = "eager"
    return small.float()


def _candidates(module: Any) -> Iterator[ExpertGeometry]:
    numbers = {float(value) for value in vars(module).values() if type(value) in (int, float) and value > 0}
    for name, activation in ACTIVATIONS.items():
        if (name in GATED) != module.has_gate:
            continue
        alphas = sorted(numbers | {DEFAULT_ALPHA}) if "alpha" in activation.parameters else [DEFAULT_ALPHA]
        limits = sorted(numbers | {DEFAULT_LIMIT}) if "limit" in activation.parameters else [DEFAULT_LIMIT]
        for alpha in alphas:
            for limit in limits:
                yield ExpertGeometry(
                    experts=EXPERTS,
                    top_k=CHOICES,
                    hidden=HIDDEN,
                    intermediate=INTERMEDIATE,
                    activation=name,
                    bias=module.has_bias,
                    alpha=alpha,
                    limit=limit,
                )


def _computed(small: Any, geometry: ExpertGeometry, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The output of experts with ``geometry`` and the module's weights, token by token, as defined in ``ExpertGeometry``."""
    up_name = "gate_up_proj" if small.has_gate else "up_proj"
    outputs = torch.zeros_like(x)
    for expert in range(EXPERTS):
        up, down = getattr(small, up_name)[expert], small.down_proj[expert]
        up, down = (up.T, down.T) if small.is_transposed else (up, down)
        rows = x @ up.T + (getattr(small, f"{up_name}_bias")[expert] if small.has_bias else 0)
        if small.has_gate and not small.is_concatenated:
            rows = torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)
        y = activate(rows, geometry) @ down.T + (small.down_proj_bias[expert] if small.has_bias else 0)
        outputs += y * (gates * (ids == expert)).sum(1, keepdim=True)
    return outputs


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool(torch.allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE))
