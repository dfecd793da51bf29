"""Watches one non-expert module while the model runs, and runs it again with other weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from rq_compile.architectures.dense_modules import DenseModule
from rq_compile.calibration.text import Batch
from rq_compile.processes import world
from rq_compile.quantization.formats import Format
from rq_compile.quantization.second_moment import SecondMoment, add_products, block_products, moment_of

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
        if self._whole:
            add_products(self._total, rows)
        else:
            self._total += block_products(rows.numpy(), BLOCK)

    def summed(self) -> SecondMoment:
        """Of all processes."""
        return moment_of(self._total) if self._whole else SecondMoment(world().sum(self._total).astype(np.float32))


@dataclass(frozen=True)
class Seen:
    """What all processes saw of the module of ``watch``: for every matrix that was used, the one whose input it shares, and the
    moments of these."""

    watch: "Watch"
    inputs: dict[str, str]
    moments: dict[str, SecondMoment]


@dataclass(frozen=True)
class _Call:
    """One call of the module, for some rows of a batch, of which ``real`` are no padding: its arguments, what it ``returned``,
    what the routed ``experts`` in it gave, and, for attention, what entered the layer."""

    real: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: torch.Tensor
    experts: torch.Tensor | None
    entered: torch.Tensor | None


class Watch:
    """Hooks on ``module`` and its matrices in ``net``. ``batch()`` is the batch that runs; of the ``sampled`` ones, by identity,
    the arguments are kept for about so many token rows. ``hidden``: see ``InputMoment``."""

    def __init__(
        self, net: nn.Module, module: DenseModule, hidden: int, batch: Callable[[], Batch], sampled: Mapping[int, int]
    ) -> None:
        self.module = module
        self._batch, self._sampled, self._hidden = batch, sampled, hidden
        self._inputs: dict[str, str] = {}
        self._columns: dict[str, int] = {}
        self._moments: dict[str, InputMoment] = {}
        self._given: dict[int, tuple[str, torch.Tensor]] = {}  # by identity, the inputs of the call that runs
        self._calls: list[_Call] = []
        self._entered: torch.Tensor | None = None  # the hidden states that enter the layer, in the batch that runs
        self._routed: torch.Tensor | None = None
        run = net.get_submodule(module.run)
        self._handles = [run.register_forward_pre_hook(self._begun), run.register_forward_hook(self._called, with_kwargs=True)]
        if module.kind == "attention" and module.layer is not None:
            layer = net.get_submodule(module.layer)
            self._handles.append(layer.register_forward_pre_hook(self._entering, with_kwargs=True))
        if module.experts is not None:
            self._handles.append(net.get_submodule(module.experts).register_forward_hook(self._chosen))
        for name in module.matrices:
            part: Any = net.get_submodule(name.removesuffix(".weight"))
            self._columns[name] = part.in_features
            self._handles.append(part.register_forward_pre_hook(self._multiplied(name)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = (args or tuple(kwargs.values()))[0]

    def _begun(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._given, self._routed = {}, None

    def _chosen(self, module: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        self._routed = returned if isinstance(returned, torch.Tensor) else None

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        batch = self._batch()
        if id(batch) in self._sampled:
            real = torch.from_numpy(batch.decoder.real)
            routed = self._routed if self._routed is not None and self._routed.numel() == _output(returned).numel() else None
            call = _Call(real, args, kwargs, _output(returned), routed, self._entered)
            most = self._sampled[id(batch)]
            self._calls.append(_of_sequences(call, most) if self.module.kind == "attention" else _of_rows(call, most))

    def _multiplied(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not args:
                return
            x = args[0]
            first, _ = self._given.setdefault(id(x), (name, x))
            self._inputs.setdefault(name, first)
            if self._inputs[name] == name:
                moment = self._moments.setdefault(name, InputMoment(self._columns[name], self._hidden))
                moment.add(_real(x, torch.from_numpy(self._batch().decoder.real)).float().cpu())

        return seen

    def seen(self) -> Seen:
        """The same in all processes, which also get the kept calls of all."""
        inputs: dict[str, str] = world().from_first(self._inputs)
        moments = {}
        for name in dict.fromkeys(inputs.values()):
            moments[name] = self._moments.get(name, InputMoment(self._columns[name], self._hidden)).summed()
        if world().size > 1:
            own = [_with(call, call.real, torch.Tensor.cpu) for call in self._calls]
            self._calls = [call for calls in world().all(range(world().size), [own]) for call in calls]
        return Seen(self, inputs, moments)

    def errors(
        self, net: nn.Module, formats: Sequence[Format], own: Mapping[Format, Mapping[str, torch.Tensor]]
    ) -> tuple[dict[Format, float], float | None, int]:
        """Squared changes of the output with the weights in each of ``formats``; the squared norm of the residual stream with the
        output added to it (None if the output is not added to what enters the layer); both summed over the tokens of kept calls;
        and their number. ``own``: the weights in the formats that this process measures; those of others are 0 here. There may be
        fewer calls than processes, so these share the formats."""
        sums = np.zeros(len(formats))
        square, rows = 0.0, 0
        module = net.get_submodule(self.module.run)
        below = len(f"{self.module.run}.")
        # Routed experts may not be loaded.
        device = next(weight.device for weight in module.parameters() if not weight.is_meta)
        for call in (_with(call, call.real, lambda tensor: tensor.to(device)) for call in self._calls):
            with torch.inference_mode(), _experts_give(net, self.module.experts, call.experts):
                before = call.returned
                if self.module.experts is not None and call.experts is None:
                    before = _output(module(*call.args, **call.kwargs))
                for format, weights in own.items():
                    other = {name[below:]: weight.to(before.device) for name, weight in weights.items()}
                    after = _output(functional_call(module, other, call.args, call.kwargs))
                    sums[formats.index(format)] += _squares(_real(after - before, call.real))
                rows += int(call.real.sum())
                if call.entered is not None and call.entered.shape == before.shape:
                    square += _squares(_real(call.entered + before, call.real))
        self._calls.clear()
        return dict(zip(formats, sums.tolist(), strict=True)), square or None, rows


def _of_sequences(call: _Call, most: int) -> _Call:
    """The call for the first sequences, of at most ``most`` rows in total, but at least one: a row depends on others of its
    sequence. All sequences if the arguments have other first dimensions."""
    sequences, length = call.real.shape
    count = max(1, most // length)
    if count >= sequences or any(len(tensor) not in (1, sequences) for tensor in _given(call) if tensor.ndim > 1):
        return call
    return _with(
        call, call.real[:count], lambda tensor: tensor[:count].clone() if tensor.ndim > 1 and len(tensor) == sequences else tensor
    )


def _of_rows(call: _Call, most: int) -> _Call:
    """The call for at most ``most`` rows, evenly spaced, if a row depends on no other: if the module is given nothing else."""
    rows = torch.nonzero(call.real.ravel()).ravel()
    if len(rows) <= most or [tensor.shape for tensor in _given(call)] != [call.returned.shape]:
        return call
    kept = rows[torch.arange(most) * len(rows) // most].to(call.returned.device)
    return _with(
        call, torch.ones(1, most, dtype=torch.bool), lambda tensor: tensor.reshape(call.real.numel(), -1)[kept].unsqueeze(0)
    )


def _given(call: _Call) -> list[torch.Tensor]:
    return [value for value in tree_leaves((call.args, call.kwargs)) if isinstance(value, torch.Tensor)]


def _with(call: _Call, real: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> _Call:
    """The call with other tensors."""
    names = ("args", "kwargs", "returned", "experts", "entered")
    return replace(call, real=real, **{name: tree_map_only(torch.Tensor, change, getattr(call, name)) for name in names})


def _output(returned: Any) -> torch.Tensor:
    return returned[0] if isinstance(returned, tuple) else returned


def _real(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The rows of ``x [..., columns]`` without those of padding, where they can be told."""
    rows = x.reshape(-1, x.shape[-1])
    return rows[real.ravel().to(x.device)] if len(rows) == real.numel() else rows


def _squares(rows: torch.Tensor) -> float:
    return float(rows.double().square().sum())


@contextmanager
def _experts_give(net: nn.Module, name: str | None, outputs: torch.Tensor | None) -> Iterator[None]:
    """A context in which the routed experts, whose weights may not be loaded, give ``outputs``; zeros if these are not known.
    What other weights change stays."""
    if name is None:
        yield
        return
    parent, _, child = name.rpartition(".")
    block, experts = net.get_submodule(parent), net.get_submodule(name)
    setattr(block, child, _Known(outputs))
    try:
        yield
    finally:
        setattr(block, child, experts)


class _Known(nn.Module):
    def __init__(self, outputs: torch.Tensor | None) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros_like(hidden) if self._outputs is None else self._outputs.reshape(hidden.shape)
