"""Calibrate a checkpoint on texts: run it once, recording, and measure layer after layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from time import monotonic
from typing import Any

import numpy as np

from rq_compile import __version__
from rq_compile.architectures.layers import ExpertWeights, MoeLayer
from rq_compile.architectures.load import torch_threads
from rq_compile.architectures.model import Model
from rq_compile.architectures.ties import remarks_on_ties
from rq_compile.architectures.without_engine import remarks_without_engine
from rq_compile.calibration.dense import DenseMeasurements, Stream
from rq_compile.calibration.dense_bytes import other_weights
from rq_compile.calibration.estimate import relative_errors
from rq_compile.calibration.lengths import batch_size_for, sequence_length_for
from rq_compile.calibration.measure import LayerMeasurement, measure_layer
from rq_compile.calibration.memory import Way, choose_way
from rq_compile.calibration.recording import LayerRecording, record_whole_model
from rq_compile.calibration.schema import Calibration, CalibrationText, LayerCalibration, LayerSums
from rq_compile.calibration.scratch import on_disk, return_freed
from rq_compile.calibration.split import Split
from rq_compile.calibration.statistics import outputs_of, tensors_of
from rq_compile.calibration.stored import formats_to_measure, layers_to_measure, lossless_format, stored_layer
from rq_compile.calibration.streaming import record_layer_by_layer
from rq_compile.calibration.text import Batch, batches, tokenize
from rq_compile.calibration.unfinished import InProcess, Unfinished
from rq_compile.calibration.wanda import WANDA_FRACTION
from rq_compile.errors import UserError
from rq_compile.files import sha256
from rq_compile.processes import device_of_process, world
from rq_compile.quantization.formats import MEASURED_FORMATS, Block, Format, Quantizer
from rq_compile.texts import Text

# Disk space for the recorded inputs of all layers if the model runs as a whole. If more would be needed, an evenly spaced sample
# of the tokens is measured (all tokens are counted).
MAX_RECORDED_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Work:
    """The work of a calibration, known before any weight is read.

    ``tokens``: those of each text. ``cut``: the names of the texts that have more tokens. ``measured``: the number of tokens
    whose expert inputs are measured. ``rows``: the number of token rows in all batches, padding included.
    """

    layers: Sequence[MoeLayer]
    tokens: list[np.ndarray]
    cut: list[str]
    measured: int
    batch_size: int
    sequence_length: int
    batches: list[Batch]
    rows: int
    way: Way

    @property
    def total(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def remarks(self) -> list[str]:
        """For the user."""
        return [self.way.reason, *([_cut(self.cut, len(self.tokens), self.total)] if self.cut else [])]


def _cut(names: list[str], texts: int, tokens: int) -> str:
    longer = "the text is" if texts == 1 else f"{len(names)} of {texts} texts are" if len(names) > 1 else f"{names[0]} is"
    return f"{longer} longer than what is run of it, from its beginning: {tokens:,} tokens in all; --tokens N runs more or fewer"


def work_of(
    model: Model,
    texts: Mapping[str, str | Text],
    *,
    tokens: int | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    memory_limit: int | None = None,
    device: str = "cpu",
) -> Work:
    """The work of ``calibrate`` with these arguments, and how it will run.

    Raises:
        UserError: there is no text or one of too few tokens, the tokenizer is missing or not the model's, the sequences are
            longer than the model's, the device does not exist, or not one layer fits into the limit.
    """
    if not texts:
        raise UserError("there is no text to calibrate on; give at least one --text FILE", 2)
    sequence_length = sequence_length or sequence_length_for(model.text_config)
    batch_size = batch_size or batch_size_for(sequence_length)
    start = _check_fit(model, sequence_length)
    layers, run = model.layers, tokenize(model, texts, tokens)
    total = sum(map(len, run.of))
    cut = partial(batches, run.of, batch_size=batch_size, sequence_length=sequence_length, decoder_start=start)
    all_measured = list(cut(measured_tokens=total))
    rows = sum(side.real.size for batch in all_measured for side in batch.sides)
    way = choose_way(model, layers, rows=rows, limit=memory_limit, device=device)
    # Layer by layer, only the inputs of one layer are recorded at a time.
    room = MAX_RECORDED_BYTES // (4 * sum(layer.geometry.hidden for layer in layers)) if way.whole else total
    measured = min(total, room)
    return Work(
        layers,
        run.of,
        run.cut,
        measured,
        batch_size,
        sequence_length,
        all_measured if measured == total else list(cut(measured_tokens=measured)),
        rows,
        way,
    )


@torch_threads()
def calibrate(
    model: Model,
    texts: Mapping[str, str | Text],
    *,
    tokens: int | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    progress: Callable[[int, int], None],
    quantizer: Quantizer = "gptq",
    block: Block | None = None,
    formats: Sequence[Format] = MEASURED_FORMATS,
    wanda_fraction: float = WANDA_FRACTION,
    memory_limit: int | None = None,
    device: str = "cpu",
    remark: Callable[[str], None] = lambda text: None,
    detail: Callable[[str], None] = lambda text: None,
    kept: InProcess | Unfinished | None = None,
) -> tuple[Calibration, dict[str, np.ndarray]]:
    """Run the model over ``texts`` (name to content) in fp32, and measure every expert unrounded, in 16 bits and rounded to
    ``formats``.

    Weights are rounded by ``quantizer`` in blocks of ``block`` weights, as in the engines that will use this calibration. If
    ``block`` is None, it is the checkpoint's own block size where slots can hold the stored weights exactly, otherwise 128.

    At most ``tokens`` tokens are run, from the beginnings of the texts (None: all). A text is cut into sequences of
    ``sequence_length`` tokens; a batch holds up to ``batch_size`` sequences of one text (None: see ``lengths.py``). An
    encoder-decoder model reads the first half of a sequence with its encoder and the second half with its decoder.
    ``wanda_fraction`` is the paper's s. ``progress(done, total)`` counts tokens: running the model counts for half of each token,
    and measuring experts on it for the other half.

    A model that does not fit into ``memory_limit`` bytes (by default: what is available) is run layer by layer (``memory.py``,
    ``streaming.py``), with the same result to fp32 rounding. ``remark`` receives sentences about how the model runs and whether
    experts tie. ``device`` is the torch device that runs the model and its experts; the CPU rounds.

    Several processes (see ``processes``) share the batches, then the experts of a layer, and each returns the result. Only the
    first one keeps layers.

    In a run layer by layer, finished layers are ``kept``, so that an interrupted run continues after the last of them. ``detail``
    receives the layer that is measured, and the speed.

    The second result holds the statistics that ``statistics.py`` describes, by tensor name, mapped from temporary files. It is
    empty for the quantizer "nearest" without the format "constant", which need no statistics.

    Raises:
        UserError: see ``work_of``; or a layer's routing or output is invalid (see ``LayerRecording``).
    """
    device = device_of_process(device)
    work = work_of(
        model,
        texts,
        tokens=tokens,
        batch_size=batch_size,
        sequence_length=sequence_length,
        memory_limit=memory_limit,
        device=device,
    )
    for text in (*remarks_without_engine(model), *work.remarks, *remarks_on_ties(model)):
        remark(text)
    layers = layers_to_measure(model, block)
    measured_formats = formats_to_measure(model, layers, formats)
    report = _Report(progress, detail, work.total, len(layers), sum(layer.geometry.experts for layer in layers))
    digests = {name: Text.of(text).sha256 for name, text in texts.items()}
    kept = kept if kept is not None and not work.way.whole else InProcess()
    kept.take_up(
        {
            "tool": __version__,
            "model": model.fingerprint,
            "texts": digests,
            "tokens": [len(ids) for ids in work.tokens],
            "batch_size": work.batch_size,
            "sequence_length": work.sequence_length,
            "quantizer": quantizer,
            "blocks": [layer.geometry.block for layer in layers],
            "formats": measured_formats,
            "wanda_fraction": wanda_fraction,
        }
    )
    split = Split.of(work.batches)
    kept.layers = world().from_first(kept.layers)
    dense = DenseMeasurements(model, work.batches, quantizer)
    measured: tuple[LayerCalibration, dict[str, np.ndarray]]

    def finish(states: Any) -> None:
        layer, moments = measured
        others, more = dense.take()
        kept.add(with_stream(layer, dense.stream(layer.name)), moments | more, states, others)

    if work.way.whole:
        recorded = record_whole_model(model, layers, list(texts), work.batches, device=device, progress=report.ran, dense=dense)
    else:
        recorded = record_layer_by_layer(
            *(model, layers, list(texts), split.own(work.batches)),
            device=device,
            in_memory=work.way.states_in_memory,
            progress=report.ran,
            begin=split.own_states(kept.states() if kept.layers else None),
            after=kept.layers[-1].name if kept.layers else None,
            finished=lambda states: finish(split.all_states(states)),
            dense=dense,
        )
    report.begin(kept.layers)
    for own in recorded:
        recording = split.all_of(own.layer)
        read = report.layer(own.read, recording.layer.geometry.experts)
        with split.all_outputs(recording, own.output, in_memory=work.way.states_in_memory) as output:
            measurement = _measure(recording, read, output, measured_formats, quantizer, wanda_fraction, device, own.first)
        return_freed()
        report.measured()
        kept_tensors = {}
        if quantizer == "gptq":
            kept_tensors = tensors_of(recording.layer.name, measurement.input_moment, measurement.intermediate_moments)
        if "constant" in measured_formats:
            kept_tensors |= outputs_of(recording.layer.name, measurement.weighted_outputs, measurement.squared_gates)
        measured = _layer_calibration(model, recording, measurement), kept_tensors
        if work.way.whole:
            finish(None)
    last, more = dense.take()
    measured_layers, statistics = kept.layers, kept.statistics() | {name: on_disk(moment) for name, moment in more.items()}
    modules = {module.name: module for module in (*kept.dense, *last)}
    calibration = Calibration(
        tool=f"rq-compile {__version__}",
        model=model.name,
        model_type=model.model_type,
        fingerprint=model.fingerprint,
        tokenizer=sha256(model.path / "tokenizer.json"),
        dtype=lossless_format(model, measured_layers),
        texts=[
            CalibrationText(name=name, sha256=digest, tokens=len(ids))
            for (name, digest), ids in zip(digests.items(), work.tokens, strict=True)
        ],
        tokens=work.total,
        measured_tokens=work.measured,
        padding_tokens=sum(batch.padding_tokens for batch in work.batches),
        batch_size=work.batch_size,
        sequence_length=work.sequence_length,
        wanda_fraction=wanda_fraction,
        quantizer=quantizer,
        statistics=None,
        extra_layers=model.extra_layers,
        layers=measured_layers,
        dense=[modules[module.name] for module in dense.modules if module.name in modules],
        other_weights=other_weights(model, dense.modules),
    )
    return calibration, statistics


def with_stream(layer: LayerCalibration, stream: Stream | None) -> LayerCalibration:
    """``layer`` with the sums of the residual stream behind it."""
    if layer.sums is None or stream is None or not stream.square:
        return layer
    sums = layer.sums.model_copy(update={"stream": stream.square, "inverse_stream": stream.inverse})
    return layer.model_copy(update={"sums": sums, "stream_share": share(sums), "sensitivity": sensitivity(sums, layer.tokens)})


def share(sums: LayerSums) -> float | None:
    return float(f"{sums.output_square / sums.stream:.6g}") if sums.stream else None


def sensitivity(sums: LayerSums, tokens: float) -> float | None:
    """``LayerCalibration.sensitivity`` from the sums over ``tokens``."""
    return float(f"{sums.output_square * sums.inverse_stream / tokens**2:.6g}") if sums.inverse_stream else None


def _check_fit(model: Model, sequence_length: int) -> int | None:
    """The first decoder token of an encoder-decoder model, once sequences are known to fit the model."""
    config = model.text_config
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise UserError(
            f"--sequence-length {sequence_length} is more than the model's {longest} positions; choose a smaller one", 2
        )
    return (model.decoder_start or 0) if config.is_encoder_decoder else None


class _Report:
    """Reports the progress, of which running the model is one half and measuring experts the other, and the current layer."""

    def __init__(
        self, progress: Callable[[int, int], None], detail: Callable[[str], None], tokens: int, layers: int, experts: int
    ) -> None:
        self._progress, self._detail = progress, detail
        self._tokens, self._layers, self._experts = tokens, layers, experts
        self._ran, self._measured, self._end, self._number, self._known = 0.0, 0, 0, 0, 0
        self._began = monotonic()

    def begin(self, done: Sequence[LayerCalibration]) -> None:
        """Continue after these layers of an earlier run."""
        self._number, self._measured = len(done), sum(layer.geometry.experts for layer in done)
        self._known, self._began = self._measured, monotonic()

    def ran(self, part: float) -> None:
        self._ran = part
        self._tell()

    def layer(self, read_expert: Callable[[int], ExpertWeights], experts: int) -> Callable[[int], ExpertWeights]:
        """Start the next layer, of so many ``experts``. Returns ``read_expert``, wrapped to report progress; other processes are
        taken to read as many."""
        self._number += 1
        before, self._end, read_here = self._measured, self._measured + experts, count()

        def read(expert: int) -> ExpertWeights:
            self._measured = min(before + next(read_here) * world().size, self._end - 1)
            rate = (self._measured - self._known) / max(1e-3, monotonic() - self._began)
            self._detail(f"layer {self._number} of {self._layers}, {rate:.3g} experts/s")
            self._tell()
            return read_expert(expert)

        return read

    def measured(self) -> None:
        """The layer is done."""
        self._measured = self._end
        self._tell()

    def _tell(self) -> None:
        self._progress(int((self._ran + self._measured / self._experts) / 2 * self._tokens), self._tokens)


def _measure(
    recording: LayerRecording,
    read_expert: Callable[[int], ExpertWeights],
    output: np.ndarray | None,
    formats: tuple[Format, ...],
    quantizer: Quantizer,
    wanda_fraction: float,
    device: str,
    first: Callable[[], None],
) -> LayerMeasurement:
    """The layer's calibration; its sums are scaled up to all tokens if only a sample was recorded."""
    layer = recording.layer
    hidden, ids, gates = recording.measured()
    measurement = measure_layer(
        layer.geometry,
        *(hidden, ids, gates, read_expert),
        output=output,
        formats=formats,
        quantizer=quantizer,
        wanda_fraction=wanda_fraction,
        device=device,
        first=first,
    )
    if not 0 < measurement.output_square < np.inf:
        raise UserError(
            f"the squared norm of the output of {layer.name} on the calibration text is {measurement.output_square:g}, so errors "
            "cannot be measured relative to it; check the checkpoint's weights"
        )
    return measurement.scaled(recording.load, recording.tokens / len(ids))


def _layer_calibration(model: Model, recording: LayerRecording, measurement: LayerMeasurement) -> LayerCalibration:
    errors, estimated = relative_errors(measurement, recording.load)
    return LayerCalibration(
        name=recording.layer.name,
        index=recording.layer.index,
        geometry=recording.layer.geometry,
        load=recording.load.tolist(),
        text_loads=recording.text_loads.tolist(),
        batch_loads=[load.tolist() for load in recording.batch_loads],
        dropped=recording.dropped,
        **stored_layer(model, recording.layer),
        wanda=legible(measurement.wanda),
        error={format: legible(error) for format, error in errors.items()},
        estimated=np.flatnonzero(estimated).tolist(),
        sums=measurement.sums,
    )


def legible(values: np.ndarray) -> list[float]:
    """Round to six significant digits: further digits of a sum of fp32 values are noise, and people read this file."""
    return [float(f"{value:.6g}") for value in values]
