"""Runs the model over batches, counts the choices of every layer's router, and keeps the inputs of its experts on disk."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from rq_compile import spill
from rq_compile.architectures.layers import ExpertWeights, MoeLayer
from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.architectures.traced import text_body
from rq_compile.calibration.dense import DenseMeasurements
from rq_compile.calibration.routing import Routing, watch
from rq_compile.calibration.text import Batch
from rq_compile.errors import UserError


@dataclass(frozen=True)
class SeenBatch:
    """The data of one batch of text number ``text`` in one layer. ``load`` int64 ``[m]`` counts the choices of its ``tokens``
    real tokens, of which ``dropped`` choices were not computed by the model. For the T measured tokens: ``hidden [T, hidden]``
    fp32, ``ids [T, k]`` int64 and ``gates [T, k]`` fp32."""

    text: int
    tokens: int
    load: np.ndarray
    dropped: int
    hidden: np.ndarray
    ids: np.ndarray
    gates: np.ndarray


class LayerRecording:
    """The recorded data of one MoE layer.

    ``text_loads [texts, m]`` and ``batch_loads``, an ``[m]`` for each batch, both int64, count the choices of every real token.
    ``dropped`` of these choices were not computed by the model. The inputs, expert ids and gates of the measured tokens are kept.
    Every batch is begun, received and ended. ``texts``: the names of the texts, to which batches refer by number.
    """

    def __init__(self, layer: MoeLayer, texts: list[str]) -> None:
        self.layer = layer
        self.texts = texts
        self._hidden = spill.unnamed_file()  # open as long as the recording exists
        self.batches: list[SeenBatch] = []  # without their inputs

    @property
    def tokens(self) -> int:
        return sum(seen.tokens for seen in self.batches)

    @property
    def dropped(self) -> int:
        return sum(seen.dropped for seen in self.batches)

    @property
    def batch_loads(self) -> list[np.ndarray]:
        return [seen.load for seen in self.batches]

    @property
    def text_loads(self) -> np.ndarray:
        loads = np.zeros((len(self.texts), self.layer.geometry.experts), np.int64)
        for seen in self.batches:
            loads[seen.text] += seen.load
        return loads

    @property
    def load(self) -> np.ndarray:
        """int64 ``[m]``, over all texts."""
        return self.text_loads.sum(0)

    def begin(self, batch: Batch) -> None:
        self._text = batch.text
        in_encoder = self.layer.name.startswith("encoder.")
        self._rows = batch.encoder if in_encoder and batch.encoder is not None else batch.decoder
        self._received: SeenBatch | None = None

    def receive(self, routing: Routing) -> None:
        """Count one call of the layer's experts on the batch that has begun.

        Raises:
            UserError: it does not have the batch's tokens, or an input or gate is not finite.
        """
        real, measured = self._rows.real.ravel(), self._rows.measured.ravel()
        hidden, ids, gates = (tensor.cpu().numpy() for tensor in (routing.hidden, routing.ids, routing.gates))
        if len(ids) != len(real):
            raise UserError(
                f"{self.layer.name} was given {len(ids)} tokens of a batch of {len(real)}, so that padding cannot be recognised; "
                "use a transformers version that this rq-compile supports"
            )
        if not (np.isfinite(hidden[real]).all() and np.isfinite(gates[real]).all()):
            name = self.texts[self._text]
            raise UserError(f"the input of {self.layer.name} is not finite on {name}; check the checkpoint's weights")
        known = ids[real & (ids >= 0).all(1) & (ids < self.layer.geometry.experts).all(1)]
        self._received = SeenBatch(
            text=self._text,
            tokens=int(real.sum()),
            load=np.bincount(known.ravel(), minlength=self.layer.geometry.experts),
            dropped=0 if routing.dropped is None else int(routing.dropped.cpu().numpy()[real].sum()),
            hidden=hidden[measured].astype(np.float32, copy=False),
            ids=ids[measured],
            gates=gates[measured].astype(np.float32),
        )

    def end(self) -> None:
        """Keep the received data.

        Raises:
            UserError: the batch's counts do not sum to its tokens * top_k, or the disk is full.
        """
        routed = 0 if self._received is None else self._received.load.sum()
        tokens, top_k = int(self._rows.real.sum()), self.layer.geometry.top_k
        if self._received is None or routed != tokens * top_k:
            raise UserError(
                f"{self.layer.name} routed {routed} (token, choice) pairs of a batch of {self.texts[self._text]}, but "
                f"{tokens} tokens x top-k {top_k} = {tokens * top_k} were expected; check the experts in the model's config.json"
            )
        self.add(self._received)

    def add(self, seen: SeenBatch) -> None:
        """Add the next batch.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._hidden.write(np.ascontiguousarray(seen.hidden).data)
            self._hidden.flush()
        except OSError as error:
            raise UserError(
                f"cannot keep the inputs of {self.layer.name} in {spill.folder()}: {error.strerror}; "
                "free space there or name another folder in TMPDIR"
            ) from error
        self.batches.append(replace(seen, hidden=np.zeros((0, 0), np.float32)))

    def seen(self) -> Iterator[SeenBatch]:
        """Every batch that was added."""
        if not self.batches:
            return
        hidden, start = self.measured()[0], 0
        for seen in self.batches:
            yield replace(seen, hidden=np.array(hidden[start : start + len(seen.ids)]))
            start += len(seen.ids)

    def measured(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``hidden [T, hidden]`` fp32 (mapped from disk), ``ids [T, k]`` int64, ``gates [T, k]`` fp32 of the measured tokens."""
        ids = np.concatenate([seen.ids for seen in self.batches])
        shape = (len(ids), self.layer.geometry.hidden)
        hidden = np.memmap(self._hidden, np.float32, "r", shape=shape) if len(ids) else np.zeros(shape, np.float32)
        return hidden, ids, np.concatenate([seen.gates for seen in self.batches])


@dataclass(frozen=True)
class Recorded:
    """A ``layer`` to be measured. See ``measure_layer``: ``read`` reads one of its experts; to ``output``, if any, the experts'
    outputs are added; ``first`` is what is measured beside the experts."""

    layer: LayerRecording
    read: Callable[[int], ExpertWeights]
    output: np.ndarray | None = None
    first: Callable[[], None] = lambda: None


def record_whole_model(
    model: Model,
    layers: Sequence[MoeLayer],
    texts: list[str],
    batches: list[Batch],
    *,
    device: str = "cpu",
    progress: Callable[[float], None],
    dense: DenseMeasurements,
) -> Iterator[Recorded]:
    """Run the whole model in fp32, with the ``dense`` measurements, and yield one layer after another to be measured.
    ``progress`` gets the fraction of the tokens that has been run.

    Raises:
        UserError: see ``record``.
    """
    total = sum(batch.tokens for batch in batches)
    recordings = record(model, layers, texts, batches, lambda done: progress(done / total), device, dense)
    for recording in recordings:
        yield Recorded(recording, partial(model.expert, recording.layer))


def record(
    model: Model,
    layers: Sequence[MoeLayer],
    texts: list[str],
    batches: Iterable[Batch],
    progress: Callable[[int], None],
    device: str = "cpu",
    dense: DenseMeasurements | None = None,
) -> list[LayerRecording]:
    """One recording per layer. ``texts``: the names of the texts, to which batches refer by number. The model is loaded in fp32
    to ``device`` and released afterwards. ``progress`` gets the number of tokens that are done.

    Raises:
        UserError: see ``load_model`` and ``LayerRecording``.
    """
    module: Any = load_model(model)
    module.to(device)
    recordings = [LayerRecording(layer, texts) for layer in layers]
    for recording in recordings:
        watch(module, recording.layer, recording.receive)
    done = 0

    def run(batch: Batch) -> torch.Tensor:
        nonlocal done
        for recording in recordings:
            recording.begin(batch)
        with torch.inference_mode():
            # Without the head, whose logits are not used, if the model has a separate body.
            last: torch.Tensor = text_body(module)(**model_arguments(batch, device))[0]
        for recording in recordings:
            recording.end()
        done += batch.tokens
        progress(done)
        return last

    if dense is None or not dense.modules:
        for batch in batches:
            run(batch)
    else:
        dense.of_whole_model(module, batches, run)
    return recordings


def model_arguments(batch: Batch, device: str) -> dict[str, torch.Tensor | bool]:
    """The arguments of the model's forward."""
    arguments: dict[str, torch.Tensor | bool] = {"use_cache": False}
    prefixes = ("",) if batch.encoder is None else ("", "decoder_")
    for prefix, rows in zip(prefixes, batch.sides, strict=True):
        arguments[f"{prefix}input_ids"] = torch.from_numpy(rows.ids).to(device)
        arguments[f"{prefix}attention_mask"] = torch.from_numpy(rows.real.astype(np.int64)).to(device)
    return arguments
