"""Runs a model that is larger than memory: one layer after another, with all batches, in one pass over the checkpoint.

The model is on the meta device. For every module that is visited, the model's own forward runs once per batch, up to this module,
where it ends. Modules before it were visited earlier and return their earlier results. Masks, rotary embeddings and an encoder's
output therefore reach a layer as in the model itself, so this works for every family without special cases.

A layer with experts is visited twice. The first visit ends at its experts and records the choices of the router. Then each expert
is read once and measured on its tokens. The second visit computes the layer, with the recorded outputs in place of the experts.
Attention runs before the experts, so the second visit takes its outputs from the first.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import PreTrainedModel

from rq_compile.architectures.dense_modules import DenseModule
from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.load import materialize, meta_model
from rq_compile.architectures.model import Model
from rq_compile.architectures.ties import break_ties_by_number
from rq_compile.architectures.traced import text_body
from rq_compile.calibration.dense import DenseMeasurements, Stream, stream_of
from rq_compile.calibration.recording import LayerRecording, Recorded, model_arguments
from rq_compile.calibration.routing import watch
from rq_compile.calibration.scratch import release, scratch
from rq_compile.calibration.states import Outputs, States
from rq_compile.calibration.text import Batch, Rows
from rq_compile.errors import UserError


def record_layer_by_layer(
    model: Model,
    layers: Sequence[MoeLayer],
    texts: list[str],
    batches: list[Batch],
    *,
    device: str = "cpu",
    in_memory: bool = True,
    progress: Callable[[float], None],
    begin: Any = None,
    after: str | None = None,
    finished: Callable[[Any], None] = lambda states: None,
    dense: DenseMeasurements,
) -> Iterator[Recorded]:
    """Run the model and yield one layer after another. Each layer must be measured before the next one. ``progress`` gets the
    fraction that is done.

    ``finished`` is called when a yielded layer is done, with the states with which the next one begins. ``begin``: the states of
    an earlier run for the layer after the one with experts ``after``. ``dense`` measures the other modules of these layers.

    In memory at a time, in fp32: the non-expert weights of one layer and one expert. If ``in_memory``, also the embeddings, the
    hidden states and the experts' outputs of all tokens, which are otherwise mapped from temporary files. The experts' inputs are
    always mapped.

    Raises:
        UserError: see ``materialize``, ``scratch`` and ``LayerRecording``.
    """
    run = _Run(model, batches, device)
    stacks = run.stacks(layers[0].geometry.hidden, in_memory)
    by_module = {re.sub(r"(\.\d+)\..*", r"\1", layer.name): layer for layer in layers}
    visits = (len(layers) - (not dense.modules) + sum(1 + len(stack.layers) for stack in stacks)) * len(batches)
    run.on_visit = lambda: progress(min(1.0, run.visits / visits))
    for stack, states in zip(stacks, begin or (), strict=False):
        stack.restore(states)
    before = after
    for number, stack in enumerate(stacks):
        with run.materialized(stack.embedding):
            run.visit(stack, stack.embedding)
            dense.embedding(run.net)
        for name in stack.layers:
            layer = by_module.get(name)
            if before is not None:
                run.hand_on(stack, name)
                run.visits += len(batches) * (1 if layer is None else 2)
                before = None if layer is not None and layer.name == before else before
                continue
            with run.materialized(name, without=layer.name if layer else None):
                if layer is not None:
                    recording = LayerRecording(layer, texts)
                    attention = dense.attention(name)
                    with (
                        dense.watching(run.net, [name], run.running, attention) as seen,
                        run.keeping(stack, attention) as kept,
                    ):
                        run.record(recording)
                    stack.outputs[:] = 0
                    first = partial(dense.measure, run.net, seen(), by_one=True)
                    yield Recorded(recording, partial(model.expert, layer), stack.outputs, first)
                    if layer is layers[-1] and not dense.modules:
                        finished(None)
                        progress(1)
                        return
                    with dense.watching(run.net, [name], run.running) as seen:
                        given = {layer.name: stack.given, **kept()}
                        with ExitStack() as replaced:
                            for module, of in given.items():
                                replaced.enter_context(run.instead(module, lambda *_, of=of, **__: of(run.batch)))
                            run.visit(stack, name)
                    dense.measure(run.net, seen())
                    dense.close(name, run.stream(stack))
                    finished([visited.states() for visited in stacks[: number + 1]])
                else:
                    with dense.watching(run.net, [name], run.running) as seen:
                        run.visit(stack, name)
                    dense.measure(run.net, seen())
                    dense.close(name, run.stream(stack))
    dense.head(run.outputs())
    progress(1)


class _End(Exception):
    """Ends a forward whose further results are not needed."""


class _Stack:
    """A stack of layers, the output of its embedding for each batch, and the results of its last visited layer: the hidden states
    and, in Switch, the position biases, which the first layer computes for all.

    ``outputs [real tokens, hidden]``, float64: the outputs of the experts of the visited layer. ``sides``: the stack's rows by
    batch.
    """

    def __init__(
        self, name: str, embedding: str, layers: int, sides: list[Rows], hidden: int, in_memory: bool, device: str
    ) -> None:
        self.parent = name.rpartition(".")[0]
        self.name = name
        self.embedding = embedding
        self.layers = [f"{name}.{number}" for number in range(layers)]
        self.sides = sides
        self.device = device
        self.outputs = scratch((sum(int(rows.real.sum()) for rows in sides), hidden), in_memory, np.float64)
        starts = np.cumsum([0, *(rows.ids.size for rows in sides)])
        # A model may compute more of the embeddings than the first layer's input (Gemma's inputs of each layer).
        self.embedded, self._states, self._attended = (States(starts, hidden, in_memory, device) for _ in range(3))
        self._beside: list[tuple[Any, ...] | None] = [None] * len(sides)

    def keep(self, batch: int, returned: Any) -> None:
        hidden, beside = (returned[0], returned[1:]) if isinstance(returned, tuple) else (returned, None)
        self._states.keep(batch, hidden)
        # Batches of one shape have equal position biases: one copy is enough.
        self._beside[batch] = next((known for known in self._beside if known and beside and _equal(known, beside)), beside)

    def returned(self, batch: int) -> Any:
        hidden, beside = self._states.of(batch), self._beside[batch]
        return hidden if beside is None else (hidden, *beside)

    def hidden(self, batch: int) -> torch.Tensor:
        """``[batch, length, ..., hidden]``"""
        return self._states.of(batch)

    def attention_outputs(self) -> Outputs:
        """For the attention of a layer, in the room of the previous layer's."""
        return Outputs(self._attended)

    def states(self) -> dict[str, Any]:
        """Everything that ``returned`` needs, for keeping."""
        return {"hidden": self._states.all(), "beside": list(self._beside)}

    def restore(self, states: dict[str, Any]) -> None:
        """Restore the result of ``states`` of an earlier run."""
        for batch, hidden in enumerate(states["hidden"]):
            self._states.keep(batch, hidden)
        self._beside = states["beside"]

    def given(self, batch: int) -> torch.Tensor:
        """The experts' outputs for each token, ``[tokens, hidden]``, including padding. The rows of padding are zeros, because no
        other token depends on them."""
        real = torch.from_numpy(self.sides[batch].real.ravel())
        outputs = torch.zeros(len(real), self.outputs.shape[1])
        start = sum(int(rows.real.sum()) for rows in self.sides[:batch])
        outputs[real] = torch.tensor(self.outputs[start : start + int(real.sum())], dtype=torch.float32)
        release(self.outputs)
        return outputs.to(self.device)


class _Run:
    """Runs the model's own forward over one batch after another, up to a module."""

    def __init__(self, model: Model, batches: list[Batch], device: str) -> None:
        self.visits = 0
        self.on_visit: Callable[[], None] = lambda: None
        self._model, self._batches, self._device = model, batches, device
        self._module = meta_model(model)
        break_ties_by_number(self._module, model.layers)
        self.batch = 0  # the number of the batch that is running

    @property
    def net(self) -> PreTrainedModel:
        return self._module

    def running(self) -> Batch:
        return self._batches[self.batch]

    def stream(self, stack: "_Stack") -> Stream:
        """That behind the last visited layer."""
        return stream_of((batch, stack.hidden(number)) for number, batch in enumerate(self._batches))

    def outputs(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """The results of the model's body, once all layers were visited."""
        for number, batch in enumerate(self._batches):
            self.batch = number
            with torch.inference_mode():
                last = text_body(self._module)(**model_arguments(batch, self._device))[0]
            yield batch, last

    def stacks(self, hidden: int, in_memory: bool) -> list[_Stack]:
        """The stacks in the order in which they run. Their other modules besides layers and embeddings (norms) have their
        weights."""
        stacks = []
        for number, name in enumerate(self._stack_names()):
            sides = [batch.sides[number] for batch in self._batches]
            layers: Any = self._module.get_submodule(name)
            stack = _Stack(name, self._embedding(name), len(layers), sides, hidden, in_memory, self._device)
            materialize(self._module, self._model, stack.parent, self._device, deep=False)
            for child, _ in self._module.get_submodule(stack.parent).named_children():
                if (path := f"{stack.parent}.{child}") not in (stack.name, stack.embedding):
                    materialize(self._module, self._model, path, self._device)
            stacks.append(stack)
        return stacks

    def _stack_names(self) -> list[str]:
        """For example, ``model.layers``. In an encoder-decoder, that of the encoder comes first."""
        family = self._model.family
        if family is not None:
            return [pattern.partition(".{layer}")[0] for pattern in (family.experts, family.decoder_experts) if pattern]
        return list(dict.fromkeys(re.sub(r"\.\d+\..*", "", layer.name) for layer in self._model.layers))

    def _embedding(self, stack: str) -> str:
        """The module that turns tokens into the first hidden states of the stack."""
        if self._module.config.is_encoder_decoder:
            return f"{stack.rpartition('.')[0]}.embed_tokens"
        embedding = self._module.get_input_embeddings()
        return next(name for name, module in self._module.named_modules() if module is embedding)

    @contextmanager
    def materialized(self, name: str, without: str | None = None) -> Iterator[None]:
        """A context in which the weights of the module are loaded."""
        materialize(self._module, self._model, name, self._device, without)
        try:
            yield
        finally:
            self._module.get_submodule(name).to("meta")

    @contextmanager
    def instead(self, name: str, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
        """A context in which the module computes ``forward``. Yields its original forward."""
        module: Any = self._module.get_submodule(name)
        before = module.forward
        module.forward = forward
        try:
            yield before
        finally:
            module.forward = before

    @contextmanager
    def keeping(self, stack: _Stack, attention: Sequence[DenseModule]) -> Iterator[Callable[[], dict[str, Callable[[int], Any]]]]:
        """A context in which the outputs of a layer's ``attention`` are kept if it is one module. Yields a function that gives
        the functions from batches to outputs, by module; none if they are not known for every batch."""
        outputs, name = stack.attention_outputs(), attention[0].run if len(attention) == 1 else ""
        hook = None
        if name:
            hook = self._module.get_submodule(name).register_forward_hook(lambda *seen: outputs.keep(self.batch, seen[-1]))
        try:
            yield lambda: {name: outputs.of} if name and outputs.complete(len(self._batches)) else {}
        finally:
            if hook is not None:
                hook.remove()

    def visit(self, stack: _Stack, name: str) -> None:
        """Run all batches up to the module. From then on, it returns the results of the last visited module of its stack."""

        embeds = name == stack.embedding
        keep = stack.embedded.keep if embeds else stack.keep

        def keep_and_end(*args: Any, **kwargs: Any) -> NoReturn:
            keep(self.batch, forward(*args, **kwargs))
            raise _End

        with self.instead(name, keep_and_end) as forward:
            for number in range(len(self._batches)):
                self._run(number, name)
        self.hand_on(stack, name)

    def hand_on(self, stack: _Stack, name: str) -> None:
        """Let the module return the results of the last visited module of its stack from now on."""
        returned = stack.embedded.of if name == stack.embedding else stack.returned
        module: Any = self._module.get_submodule(name)
        module.forward = lambda *args, **kwargs: returned(self.batch)

    def record(self, recording: LayerRecording) -> None:
        """Run all batches up to the layer's experts."""

        def end(*args: Any, **kwargs: Any) -> NoReturn:
            raise _End

        name = recording.layer.name
        handle = watch(self._module, recording.layer, recording.receive)
        with self.instead(name, end):
            for number, batch in enumerate(self._batches):
                recording.begin(batch)
                self._run(number, name)
                recording.end()
        handle.remove()

    def _run(self, number: int, name: str) -> None:
        self.batch = number
        with torch.inference_mode(), suppress(_End):
            text_body(self._module)(**model_arguments(self._batches[number], self._device))
            raise UserError(f"{name} was bypassed by the model; use a transformers version that this rq-compile supports")
        self.visits += 1
        self.on_visit()


def _equal(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Whether the tensors (or None) in both are equal."""
    return all(
        one is other or (one is not None and other is not None and one.shape == other.shape and torch.equal(one, other))
        for one, other in zip(some, others, strict=True)
    )
