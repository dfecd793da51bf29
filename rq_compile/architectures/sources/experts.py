"""The experts of a traced model: their modules, and each expert's matrices as expressions in canonical layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rq_compile.architectures.sources.expression import Expression, step
from rq_compile.architectures.sources.tracing import Traces

# The attribute that transformers' decorator ``use_experts_implementation`` sets on a module.
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class ExpertSources:
    """``up [F, hidden]`` (the gate's rows first), ``down [hidden, intermediate]``, and their biases or None."""

    up: Expression
    down: Expression
    up_bias: Expression | None
    down_bias: Expression | None


def experts_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every module that transformers' experts interface runs."""
    for name, module in model.named_modules():
        if all(hasattr(module, flag) for flag in FLAGS):
            yield name, module


def expert_sources(traces: Traces, name: str, expert: int) -> ExpertSources:
    """The expressions of expert number ``expert`` of the experts module ``name``."""
    module: Any = traces.model.get_submodule(name)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    interleaved = module.has_gate and not module.is_concatenated

    def matrix(parameter: str) -> Expression:
        part = traces.parameters[f"{name}.{parameter}"].select(expert)
        return step(torch.transpose, part, 0, 1) if module.is_transposed else part

    def bias(parameter: str) -> Expression | None:
        return traces.parameters[f"{name}.{parameter}_bias"].select(expert) if module.has_bias else None

    def gate_first(rows: Expression | None) -> Any:
        return step(_gate_first, rows) if interleaved and rows is not None else rows

    return ExpertSources(gate_first(matrix(up)), matrix("down_proj"), gate_first(bias(up)), bias("down_proj"))


def _gate_first(rows: torch.Tensor) -> torch.Tensor:
    """Interleaved rows of gate and up (GPT-OSS), reordered with the gate's rows first."""
    return torch.cat([rows[0::2], rows[1::2]])
