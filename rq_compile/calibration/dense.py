"""What storing the matrices of non-expert modules in fewer bits changes.

Errors of attention, FFNs and embedding are squared changes of the residual stream where the module's output is added to it; with
the squared norm of the stream, they give its relative change. For the head, it is the KL divergence of the logits. Both are in
nats: on samples/, a module that changes the stream by a share of its energy changes the logits by 0.4 to 2.9 times as many nats,
whatever kind of module it is (docs/planning.md).

While a layer runs, hooks sum the second moments of the inputs of its matrices, and keep the arguments of a few batches. The
modules then run on these again, with the values that a format stores. Of several processes, one measures a layer's attention
while the others measure its experts; the formats of other modules are shared.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rq_compile.architectures.dense_modules import DenseModule, decoder_layer, dense_modules
from rq_compile.architectures.model import Model
from rq_compile.calibration.dense_watch import InputMoment, Seen, Watch
from rq_compile.calibration.head import head_divergence
from rq_compile.calibration.schema import DenseCalibration, DenseMatrix
from rq_compile.calibration.text import Batch
from rq_compile.processes import world
from rq_compile.quantization.formats import DENSE_QUANTIZED, Format, Quantizer, block_size
from rq_compile.quantization.quantizer import stored
from rq_compile.quantization.second_moment import SecondMoment, share_feedback
from rq_compile.standalone.limits import default_threads

# Token rows on which errors are measured, but at least one sequence of attention. More rows of the same batches change less than
# rows of other batches do (docs/calibration.md), so they come from several.
SAMPLED_ROWS = 512
SAMPLED_BATCHES = 8
# Rows of an embedding table that are rounded at a time.
TABLE_ROWS = 1 << 14
Moments = dict[str, np.ndarray]


@dataclass
class _Found:
    """The measurement of a module. ``inputs``: the matrix whose input each matrix shares. ``square`` is None until the residual
    stream behind its layer is known; until then, each process has 0 as the error of formats that others measured."""

    module: DenseModule
    inputs: dict[str, str]
    error: dict[Format, float]
    square: float | None
    moments: dict[str, SecondMoment]


class DenseMeasurements:
    """The measurements of the non-expert modules of ``model`` while it runs ``batches``. Each process runs some of these, and all
    processes get all measurements."""

    def __init__(self, model: Model, batches: Sequence[Batch], quantizer: Quantizer) -> None:
        self.model, self.modules = model, dense_modules(model)
        self._batches, self._gptq = batches, quantizer == "gptq"
        longest = max((batch.decoder.ids.shape[1] for batch in batches), default=1)
        self._sampled = _sampled(batches, SAMPLED_BATCHES)
        self._sequences = _sampled(batches, min(SAMPLED_BATCHES, max(1, SAMPLED_ROWS // longest)))
        self._pending: dict[str, list[_Found]] = {}
        self._done: list[tuple[DenseCalibration, Moments]] = []
        self._streams: dict[str, Stream] = {}

    def attention(self, layer: str) -> list[DenseModule]:
        return [module for module in self.modules if module.layer == layer and module.kind == "attention"]

    @contextmanager
    def watching(
        self, net: nn.Module, layers: Sequence[str], batch: Callable[[], Batch], some: Sequence[DenseModule] | None = None
    ) -> Iterator[Callable[[], list[Seen]]]:
        """Hooks on ``some`` modules of decoder ``layers``, by default all that were not measured yet, while ``net`` runs
        ``batch()``. Yields a function that gives what was seen, to be measured."""
        hidden = self.model.text_config.hidden_size
        if some is None:
            measured = {found.module for layer in layers for found in self._pending.get(layer, [])}
            some = [module for module in self.modules if module.layer in layers and module not in measured]
        of = {"attention": self._sequences}
        watches = [Watch(net, module, hidden, batch, of.get(module.kind, self._sampled)) for module in some]
        try:
            yield lambda: [watch.seen() for watch in watches]
        finally:
            for watch in watches:
                watch.remove()

    def of_whole_model(self, net: nn.Module, batches: Iterable[Batch], run: Callable[[Batch], torch.Tensor]) -> None:
        """Measure everything while ``run(batch)`` runs all of ``net`` on one batch after another. It returns the head's input."""
        layers = list(dict.fromkeys(module.layer for module in self.modules if module.layer))
        layers += [name for name in map(decoder_layer, (moe.name for moe in self.model.layers)) if name not in layers]
        running: list[Batch] = []
        streams, outputs = dict.fromkeys(layers, Stream()), []

        def behind(layer: str) -> Callable[..., None]:
            def seen(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
                states = output[0] if isinstance(output, tuple) else output
                streams[layer] += stream_of([(running[-1], states)])

            return seen

        handles = [net.get_submodule(layer).register_forward_hook(behind(layer)) for layer in layers]
        with self.watching(net, layers, lambda: running[-1]) as seen:
            for batch in batches:
                running.append(batch)
                outputs.append((batch, run(batch)))
        self.measure(net, seen())
        for handle in handles:
            handle.remove()
        for layer, stream in streams.items():
            self.close(layer, stream)
        self.embedding(net)
        self.head(outputs)

    def measure(self, net: nn.Module, several: Sequence[Seen], *, by_one: bool = False) -> None:
        """Measure the modules, whose weights ``net`` has. If ``by_one`` process, the last, no process waits for another."""
        owners = [world().size - 1] * len(DENSE_QUANTIZED) if by_one else world().owners([1] * len(DENSE_QUANTIZED))
        for seen in several:
            inputs, moments = seen.inputs, seen.moments
            if not inputs:
                continue  # the model uses the matrices without calling their modules
            weights = {name: net.get_parameter(name).detach().cpu().numpy() for name in inputs}
            if self._gptq and not by_one:
                share_feedback([(moment, block_size(weights[name].shape[1])) for name, moment in moments.items()])
            own = {format: self._all_rounded(weights, format, inputs, moments) for format in world().own(owners, DENSE_QUANTIZED)}
            measured, square, rows = seen.watch.errors(net, DENSE_QUANTIZED, own)
            scale = _tokens(self._batches) / max(1, rows)
            error = {format: value * scale for format, value in measured.items()}
            found = _Found(seen.watch.module, inputs, error, None if square is None else square * scale, moments)
            self._pending.setdefault(str(seen.watch.module.layer), []).append(found)

    def _all_rounded(
        self, weights: dict[str, np.ndarray], format: Format, inputs: dict[str, str], moments: dict[str, SecondMoment]
    ) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(self._rounded(array, format, moments[inputs[name]])) for name, array in weights.items()}

    def _rounded(self, weights: np.ndarray, format: Format, moment: SecondMoment | None = None) -> np.ndarray:
        return stored(weights, format, moment if self._gptq else None, threads=default_threads())

    def close(self, layer: str, stream: "Stream") -> None:
        """``stream``: that behind decoder ``layer``."""
        if self.modules:
            self._streams[layer] = stream
        for found in sorted(self._pending.pop(layer, []), key=lambda found: self.modules.index(found.module)):
            errors = world().sum(np.array(list(found.error.values())))
            found.error = dict(zip(found.error, errors.tolist(), strict=True))
            self._add(found, stream.square if found.square is None else found.square)

    def stream(self, experts: str) -> "Stream | None":
        """The stream behind the decoder layer with ``experts``."""
        return self._streams.get(decoder_layer(experts))

    def embedding(self, net: nn.Module) -> None:
        """Measure the embedding, whose weights ``net`` has."""
        for module in self.modules:
            if module.kind == "embedding":
                (name,) = module.matrices
                error, square = self._embedding(net.get_parameter(name).detach().cpu().numpy())
                self._add(_Found(module, {name: name}, error, None, {}), square)

    def head(self, outputs: Iterable[tuple[Batch, torch.Tensor]]) -> None:
        """Measure the head. ``outputs``: this process's batches, with the head's inputs ``[batch, length, hidden]``."""
        for module in self.modules:
            if module.kind == "head":
                self._head(module, outputs)

    def _embedding(self, table: np.ndarray) -> tuple[dict[Format, float], float]:
        """Sums over all tokens of the squared changes of their rows, and of the rows' squares."""
        counts = np.zeros(len(table))
        for batch in self._batches:
            counts += np.bincount(batch.decoder.ids[batch.decoder.real], minlength=len(table))
        error, square = dict.fromkeys(DENSE_QUANTIZED, 0.0), 0.0
        used = np.flatnonzero(counts)
        for start in range(0, len(used), TABLE_ROWS):
            some = used[start : start + TABLE_ROWS]
            rows, count = table[some], counts[some]
            square += float(count @ np.square(rows, dtype=np.float64).sum(axis=1))
            for format in DENSE_QUANTIZED:
                changes = np.square(stored(rows, format) - rows, dtype=np.float64).sum(axis=1)
                error[format] += float(count @ changes)
        return error, square

    def _head(self, module: DenseModule, outputs: Iterable[tuple[Batch, torch.Tensor]]) -> None:
        (name,) = module.matrices
        columns = self.model.shape(name)[1]
        moment = InputMoment(columns, columns)
        sample: list[torch.Tensor] = []
        for batch, hidden in outputs:
            rows = hidden.reshape(-1, columns)[torch.from_numpy(batch.decoder.real.ravel())].float().cpu()
            moment.add(rows)
            if id(batch) in self._sampled:
                # Of each batch equally many, so that the number of processes changes nothing.
                quota = self._sampled[id(batch)]
                sample.append(rows[:: max(1, len(rows) // quota)][:quota])
        summed = moment.summed()
        weights = self.model.read(name)
        error, measured = head_divergence(
            self.model.text_config,
            weights,
            torch.cat(sample) if sample else torch.zeros(0, columns),
            lambda some, format: self._rounded(some, format, summed),
        )
        total = _tokens(self._batches)
        error = {format: value * total / max(1, measured) for format, value in error.items()}
        self._add(_Found(module, {name: name}, error, None, {name: summed}), total)

    def _add(self, found: _Found, square: float) -> None:
        kept = found.moments if self._gptq else {}
        matrices = []
        for name, first in found.inputs.items():
            rows, columns = self.model.shape(name)
            bits = 8 * self.model.dtype_of(name).itemsize
            moment = moment_name(first) if first in kept else None
            matrices.append(DenseMatrix(name=name, rows=rows, columns=columns, bits=bits, moment=moment))
        module = found.module
        error = {format: float(f"{value:.9g}") for format, value in found.error.items()}
        calibration = DenseCalibration(
            name=module.name, kind=module.kind, index=module.index, matrices=matrices, error=error, square=square
        )
        self._done.append((calibration, {moment_name(name): moment.values for name, moment in kept.items()}))

    def take(self) -> tuple[list[DenseCalibration], Moments]:
        """What was measured since the last call, and the moments for the quantizer, by the names of their tensors."""
        done, self._done = self._done, []
        return [calibration for calibration, _ in done], {name: array for _, own in done for name, array in own.items()}


def moment_name(matrix: str) -> str:
    return f"{matrix.removesuffix('.weight')}.input_moment"


@dataclass(frozen=True)
class Stream:
    """The residual stream behind a decoder layer: the squared norms of its tokens' hidden states, summed, and the sum of their
    inverses (without states of 0)."""

    square: float = 0.0
    inverse: float = 0.0

    def __add__(self, other: "Stream") -> "Stream":
        return Stream(self.square + other.square, self.inverse + other.inverse)


def stream_of(outputs: Iterable[tuple[Batch, torch.Tensor]]) -> Stream:
    """Of the real tokens of this process's batches, ``[batch, length, ..., hidden]``, and all processes."""
    total = np.zeros(2)
    for batch, states in outputs:
        rows = states.reshape(batch.decoder.real.size, -1)[torch.from_numpy(batch.decoder.real.ravel())]
        squares = rows.double().square().sum(1)
        total += float(squares.sum()), float(squares[squares > 0].reciprocal().sum())
    return Stream(*world().sum(total).tolist())


def _tokens(batches: Iterable[Batch]) -> int:
    return sum(int(batch.decoder.real.sum()) for batch in batches)


def _sampled(batches: Sequence[Batch], most: int) -> dict[int, int]:
    """The identities of evenly spaced batches, at most so many, and how many rows to take of each."""
    count = min(len(batches), most)
    return {id(batches[number * len(batches) // count]): max(1, SAMPLED_ROWS // count) for number in range(count)}
