"""Watches one non-expert module while the model runs, and runs it again with other weights."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from rq_compile.architectures.dense_modules import DenseModule
from rq_compile.calibration.text import Batch
from rq_compile.processes import world
from rq_compile.quantization.formats import Format
from rq_compile.quantization.second_moment import SecondMoment, block_products

# Inputs that are wider than the hidden states have their moments only within blocks, as those of experts' down projections.
BLOCK = 128


class InputMoment:
    """The sum of ``x x^T`` over the inputs of a matrix: whole up to ``most`` columns, otherwise within blocks."""

    def __init__(self, columns: int, most: int) -> None:
        self._whole = columns <= most
        shape = (columns, columns) if self._whole else (-(-columns // BLOCK), BLOCK, BLOCK)
        self._total = np.zeros(shape)

    def add(self, rows: torch.Tensor) -> None:
        """``rows`` fp32 ``[n, columns]``"""
        self._total += (rows.mT @ rows).numpy() if self._whole else block_products(rows.numpy(), BLOCK)

    def summed(self) -> SecondMoment:
        """Of all processes."""
        return SecondMoment(world().sum(self._total).astype(np.float32))


class Watch:
    """Hooks on ``module`` and its matrices in ``net``. ``batch()`` is the batch that runs; the arguments of the ``sampled`` ones
    are kept. ``hidden``: see ``InputMoment``."""

    def __init__(
        self, net: nn.Module, module: DenseModule, hidden: int, batch: Callable[[], Batch], sampled: Collection[int]
    ) -> None:
        self.module = module
        self._batch, self._sampled, self._hidden = batch, sampled, hidden
        self._inputs: dict[str, str] = {}
        self._columns: dict[str, int] = {}
        self._moments: dict[str, InputMoment] = {}
        self._given: dict[int, tuple[str, torch.Tensor]] = {}  # by identity, the inputs of the call that runs
        self._calls: list[tuple[Batch, tuple[Any, ...], dict[str, Any], torch.Tensor]] = []
        self._entering: list[torch.Tensor] = []  # the hidden states that enter the layer, for each kept call
        run = net.get_submodule(module.run)
        self._handles = [run.register_forward_pre_hook(self._begun), run.register_forward_hook(self._called, with_kwargs=True)]
        if module.layer is not None:
            layer = net.get_submodule(module.layer)
            self._handles.append(layer.register_forward_pre_hook(self._entered, with_kwargs=True))
        for name in module.matrices:
            part: Any = net.get_submodule(name.removesuffix(".weight"))
            self._columns[name] = part.in_features
            self._handles.append(part.register_forward_pre_hook(self._multiplied(name)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(self._batch()) in self._sampled:
            self._entering.append((args or tuple(kwargs.values()))[0])

    def _begun(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._given = {}

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        if id(batch := self._batch()) in self._sampled:
            self._calls.append((batch, args, kwargs, _output(returned)))

    def _multiplied(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not args:
                return
            x = args[0]
            first, _ = self._given.setdefault(id(x), (name, x))
            self._inputs.setdefault(name, first)
            if self._inputs[name] == name:
                moment = self._moments.setdefault(name, InputMoment(self._columns[name], self._hidden))
                moment.add(_real(x, self._batch()).float().cpu())

        return seen

    def seen(self) -> tuple[dict[str, str], dict[str, SecondMoment]]:
        """For every matrix that was used, the one whose input it shares; and the moments of these. The same in all processes."""
        inputs: dict[str, str] = world().from_first(self._inputs)
        moments = {}
        for name in dict.fromkeys(inputs.values()):
            moments[name] = self._moments.get(name, InputMoment(self._columns[name], self._hidden)).summed()
        return inputs, moments

    def errors(
        self, net: nn.Module, changed: Mapping[Format, Mapping[str, torch.Tensor]]
    ) -> tuple[dict[Format, float], float | None, int]:
        """Squared changes of the output with the weights ``changed``; the squared norm of the residual stream with the output
        added to it (None if the output is not added to what enters the layer); both summed over the tokens of kept calls; and
        their number."""
        sums = np.zeros(len(changed) + 2)
        module = net.get_submodule(self.module.run)
        below = len(f"{self.module.run}.")
        with torch.inference_mode(), _without_experts(net, self.module.experts):
            for number, (batch, args, kwargs, before) in enumerate(self._calls):
                if self.module.experts is not None:
                    before = _output(module(*args, **kwargs))
                for place, weights in enumerate(changed.values()):
                    other = {name[below:]: weight.to(before.device) for name, weight in weights.items()}
                    after = _output(functional_call(module, other, args, kwargs))
                    sums[place] += _squares(_real(after - before, batch))
                sums[-1] += int(batch.decoder.real.sum())
                if self.module.kind == "attention" and self._entering and self._entering[number].shape == before.shape:
                    sums[-2] += _squares(_real(self._entering[number] + before, batch))
        self._calls.clear()
        self._entering.clear()
        *errors, square, rows = world().sum(sums).tolist()
        return dict(zip(changed, errors, strict=True)), square or None, int(rows)


def _output(returned: Any) -> torch.Tensor:
    return returned[0] if isinstance(returned, tuple) else returned


def _real(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The rows of ``x [..., columns]`` without those of padding, where they can be told."""
    rows = x.reshape(-1, x.shape[-1])
    real = torch.from_numpy(batch.decoder.real.ravel())
    return rows[real.to(x.device)] if len(rows) == len(real) else rows


def _squares(rows: torch.Tensor) -> float:
    return float(rows.double().square().sum())


@contextmanager
def _without_experts(net: nn.Module, name: str | None) -> Iterator[None]:
    """A context in which the routed experts, whose weights may not be loaded, give zeros. What other weights change stays."""
    if name is None:
        yield
        return
    parent, _, child = name.rpartition(".")
    block, experts = net.get_submodule(parent), net.get_submodule(name)
    setattr(block, child, _Zeros())
    try:
        yield
    finally:
        setattr(block, child, experts)


class _Zeros(nn.Module):
    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros_like(hidden)
