"""Changes of non-expert modules on some rows of a batch, compared with those on the same rows of the whole batch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rq_compile.architectures.dense_modules import DenseModule
from rq_compile.calibration.dense_watch import Watch
from rq_compile.calibration.text import Batch, Rows

SEQUENCES, LENGTH, HIDDEN = 3, 6, 8


class Attention(nn.Module):
    """A token's output depends on the tokens before it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.proj(hidden * angles).cumsum(1), None


class Experts(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 3 * hidden.roll(1, -1)


class Block(nn.Module):
    """Routed experts beside a shared one, whose result is multiplied with theirs."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.shared, self.experts, self.calls = nn.Linear(HIDDEN, HIDDEN, bias=False), Experts(), calls

    def forward(self, hidden: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
        rows = hidden.view(-1, HIDDEN)
        routed = torch.cat([self.experts(part) for part in rows.chunk(self.calls)])
        return (self.shared(rows) * routed + sum(beside)).view(hidden.shape)


class Layer(nn.Module):
    def __init__(self, calls: int, beside: bool) -> None:
        super().__init__()
        self.attn, self.mlp, self.beside = Attention(), Block(calls), beside

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(hidden, angles)[0]
        return hidden + self.mlp(hidden, *([hidden.new_ones(len(hidden) * LENGTH, HIDDEN)] if self.beside else []))


ATTENTION = DenseModule("layer.attn", "attention", ("layer.attn.proj.weight",), "layer.attn", "layer", 0)
SHARED = DenseModule("layer.mlp", "shared experts", ("layer.mlp.shared.weight",), "layer.mlp", "layer", 0, "layer.mlp.experts")


def batch() -> Batch:
    real = np.ones((SEQUENCES, LENGTH), bool)
    real[0, 4:] = real[2, 1:] = False
    return Batch(0, Rows(np.zeros(real.shape, np.int64), real, real))


def watched(module: DenseModule, rows: int, *, angles: int = 1, calls: int = 1, beside: bool = False) -> tuple[Any, ...]:
    """What ``Watch.errors`` finds, and the squared changes and squares of the stream of each row ``[sequences, length]``."""
    torch.manual_seed(0)
    net: Any = nn.ModuleDict({"layer": Layer(calls, beside)}).requires_grad_(False)
    given = torch.randn(SEQUENCES, LENGTH, HIDDEN), torch.rand(angles, LENGTH, HIDDEN)
    ran = batch()
    watch = Watch(net, module, HIDDEN, lambda: ran, {id(ran): rows})
    seen: dict[str, torch.Tensor] = {}
    for name in ("attn", "mlp"):
        net.get_submodule(f"layer.{name}").register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: output[0] if name == "attn" else output, f"{name} in": args[0]})
        )
    net.layer(*given)
    (matrix,) = module.matrices
    changed = net.get_parameter(matrix) * 1.25
    watch.remove()
    before = dict(seen)
    found = watch.errors(net, ("int8",), {"int8": {matrix: changed}})
    net.get_parameter(matrix).copy_(changed)
    net.layer(*given)
    name = module.run.rpartition(".")[2]
    attention_in = before["mlp in"] if name == "mlp" else given[0]
    if name == "mlp":
        seen["mlp"] = net.layer.mlp(before["mlp in"], *([torch.ones(SEQUENCES * LENGTH, HIDDEN)] if beside else []))
    return (
        found,
        (seen[name] - before[name]).double().square().sum(-1),
        (attention_in + before[name]).double().square().sum(-1),
    )


def matches(found: tuple[Mapping[str, float], float | None, int], changes: torch.Tensor, rows: torch.Tensor) -> None:
    errors, _, count = found
    assert count == rows.sum()
    assert errors["int8"] == pytest.approx(float(changes[rows].sum()), rel=1e-5)


@pytest.mark.parametrize(("rows", "sequences"), [(1, 1), (LENGTH, 1), (2 * LENGTH, 2), (100, SEQUENCES)])
@pytest.mark.parametrize("angles", [1, SEQUENCES], ids=["angles for all sequences", "angles of each sequence"])
def test_attention_runs_again_on_whole_sequences(rows: int, sequences: int, angles: int) -> None:
    found, changes, squares = watched(ATTENTION, rows, angles=angles)
    kept = torch.from_numpy(batch().decoder.real)
    kept[sequences:] = False
    matches(found, changes, kept)
    assert found[1] == pytest.approx(float(squares[kept].sum()), rel=1e-5)


def test_attention_with_other_arguments_runs_again_on_all() -> None:
    """As with angles ``[3, batch, length, columns]`` for three axes of an image: which dimension has the sequences is unknown."""
    torch.manual_seed(0)
    net: Any = nn.ModuleDict({"layer": Layer(1, False)}).requires_grad_(False)
    ran = batch()
    watch = Watch(net, ATTENTION, HIDDEN, lambda: ran, {id(ran): 1})
    net.layer(torch.randn(SEQUENCES, LENGTH, HIDDEN), torch.rand(LENGTH, HIDDEN))
    watch.remove()
    _, _, count = watch.errors(net, ("int8",), {"int8": {ATTENTION.matrices[0]: net.layer.attn.proj.weight * 2}})
    assert count == batch().decoder.real.sum()


@pytest.mark.parametrize("rows", [1, 3, 5, 100])
def test_shared_experts_run_again_on_some_rows_with_what_the_routed_ones_gave(rows: int) -> None:
    found, changes, _ = watched(SHARED, rows)
    real = torch.nonzero(torch.from_numpy(batch().decoder.real.ravel())).ravel()
    chosen = torch.zeros(SEQUENCES * LENGTH, dtype=torch.bool)
    chosen[real if rows >= len(real) else real[torch.arange(rows) * len(real) // rows]] = True
    matches(found, changes, chosen.view(SEQUENCES, LENGTH))


def test_shared_experts_with_further_arguments_run_again_on_all_rows() -> None:
    found, changes, _ = watched(SHARED, 2, beside=True)
    matches(found, changes, torch.from_numpy(batch().decoder.real))


def test_routed_experts_that_run_in_parts_count_as_zeros() -> None:
    found, _, _ = watched(SHARED, 2, calls=2)
    assert found == ({"int8": 0.0}, None, 2)
