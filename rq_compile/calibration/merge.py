"""Makes one calibration from several calibrations of a model on different texts, by adding up their counts and measurements.

Counts are exact. Sums and moments are those of all texts together, to fp32 rounding, whatever the order of the calibrations.
Calibrations with weights count as if each had run its share of all tokens, so real traffic can count more than rare kinds of
text, however long their texts are.
Errors were measured on weights that each calibration rounded by its own moments. Two numbers of an expert are not sums: its
weight error, which becomes the mean over tokens, and its Wanda score, whose squares are added, like the squared norms of its
inputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path

import numpy as np

from rq_compile import __version__, spill
from rq_compile.calibration.calibrate import legible, sensitivity, share
from rq_compile.calibration.constant import constant_error
from rq_compile.calibration.estimate import relative_errors
from rq_compile.calibration.schema import Calibration, DenseCalibration, LayerCalibration, LayerSums
from rq_compile.calibration.scratch import on_disk
from rq_compile.calibration.statistics import GATES, OUTPUTS, Statistics, write_with_statistics
from rq_compile.errors import UserError
from rq_compile.files import read_document
from rq_compile.quantization.formats import Format

# Fields that must be equal, and their names in messages.
SAME = {
    "fingerprint": "the model",
    "tokenizer": "the tokenizer",
    "quantizer": "--quantizer",
    "wanda_fraction": "--wanda-fraction",
    "batch_size": "--batch-size",
    "sequence_length": "--sequence-length",
}


def merged_into(output: Path, weights: Mapping[Path, float | None]) -> Calibration:
    """Merge the calibrations in the files ``weights`` and write the result, with its statistics, to ``output``.

    Raises:
        UserError: see ``merge``, ``merge_statistics`` and ``write_with_statistics``.
    """
    read = {path: read_document(Calibration, path) for path in weights}
    counted = factors(list(read.values()), list(weights.values()))
    merged = merge(read, counted)
    several = [
        (factor, Statistics.beside(path.parent, one.statistics))
        for (path, one), factor in zip(read.items(), counted, strict=True)
        if one.statistics
    ]
    with spill.beside(output):
        tensors = merge_statistics(merged.layers, several, merged.dense) if several else {}
    return write_with_statistics(with_constants(merged, tensors), tensors, output)


def factors(calibrations: Sequence[Calibration], weights: Sequence[float | None]) -> list[float]:
    """How often each token of each calibration counts: once, or, if there are weights, as often as gives every calibration its
    share of all tokens. A missing weight is then 1."""
    if not any(weights):
        return [1.0] * len(calibrations)
    given = [weight or 1.0 for weight in weights]
    tokens = sum(calibration.tokens for calibration in calibrations)
    return [
        weight / sum(given) * tokens / max(1, calibration.tokens) for weight, calibration in zip(given, calibrations, strict=True)
    ]


def merge(calibrations: Mapping[Path, Calibration], factors: Sequence[float] | None = None) -> Calibration:
    """The calibration of all texts. ``calibrations`` are given by the files that hold them. ``factors``: how often each token of
    each counts, by default once. ``statistics`` is not set yet.

    Raises:
        UserError: they are of different models, tokenizers, quantizers, blocks or the like, have no sums, or ran the same text.
    """
    (first_path, first), *others = calibrations.items()
    for path, calibration in calibrations.items():
        if any(layer.sums is None for layer in calibration.layers):
            raise UserError(f"{path} {_why_no_sums(calibration)}, so it has no sums to add; calibrate again on texts", 2)
    for path, other in others:
        _check_alike(first, first_path, other, path)
    counted = factors or [1.0] * len(calibrations)
    texts = [
        text.model_copy(update={"weight": text.weight * factor})
        for calibration, factor in zip(calibrations.values(), counted, strict=True)
        for text in calibration.texts
    ]
    for number, text in enumerate(texts):
        if any(text.sha256 == other.sha256 for other in texts[:number]):
            raise UserError(f"two of the calibrations ran {text.name}, which would count twice; leave one of them out", 2)
        if any(text.name == other.name for other in texts[:number]):
            raise UserError(
                f"two texts are named {text.name}; rename one and calibrate on it again, because results are listed by name", 2
            )
    several = list(calibrations.values())
    return first.model_copy(
        update={
            "tool": f"rq-compile {__version__}",
            "texts": texts,
            "tokens": sum(calibration.tokens for calibration in several),
            "measured_tokens": sum(calibration.measured_tokens for calibration in several),
            "padding_tokens": sum(calibration.padding_tokens for calibration in several),
            "statistics": None,
            "layers": [_layer(layers, counted) for layers in zip(*(calibration.layers for calibration in several), strict=True)],
            "dense": _dense([calibration.dense for calibration in several], counted),
        }
    )


def with_constants(calibration: Calibration, statistics: Mapping[str, np.ndarray]) -> Calibration:
    """``calibration`` with the errors of ``constant`` for the mean outputs in ``statistics``. The errors that were added are
    less, because every calibration has its own mean."""

    def of_layer(layer: LayerCalibration) -> LayerCalibration:
        if layer.sums is None or "constant" not in layer.sums.error:
            return layer
        weighted, gates = (statistics[f"{layer.name}.{name}"].astype(np.float64) for name in (OUTPUTS, GATES))
        found = constant_error(np.asarray(layer.sums.energy), weighted, gates).tolist()
        sums = layer.sums.model_copy(update={"error": {**layer.sums.error, "constant": found}})
        errors, _ = relative_errors(sums, np.asarray(layer.load))
        error = {**layer.error, "constant": legible(errors["constant"])}
        return layer.model_copy(update={"sums": sums, "error": error})

    return calibration.model_copy(update={"layers": [of_layer(layer) for layer in calibration.layers]})


def merge_statistics(
    layers: Sequence[LayerCalibration], several: Sequence[tuple[float, Statistics]], dense: Sequence[DenseCalibration] = ()
) -> dict[str, np.ndarray]:
    """The tensors of ``statistics.py``, mapped from temporary files. ``several``: how often the tokens of each count, and its
    statistics. One layer of one calibration is in memory at a time.

    Raises:
        UserError: see ``Statistics``; or the disk is full.
    """
    moments = [f"{layer.name}.{moment}" for layer in layers for moment in ("input_moment", "intermediate_moment")]
    of_experts = [name for name in moments if any(name in one.tensors for _, one in several)]
    of_experts += [f"{layer.name}.{moment}" for layer in layers if "constant" in layer.error for moment in (OUTPUTS, GATES)]
    of_matrices = dict.fromkeys(matrix.moment for module in dense for matrix in module.matrices if matrix.moment)
    return {name: on_disk(_sum(factor * one.tensor(name) for factor, one in several)) for name in (*of_experts, *of_matrices)}


def _sum(moments: Iterable[np.ndarray]) -> np.ndarray:
    return reduce(np.add, moments)


def _why_no_sums(calibration: Calibration) -> str:
    if calibration.data_free:
        return "was made without text"
    return "was written before schema version 2" if calibration.measured_tokens else "has loads that a server recorded"


def _check_alike(first: Calibration, first_path: Path, other: Calibration, path: Path) -> None:
    for name, called in SAME.items():
        if getattr(first, name) != getattr(other, name):
            values = "" if name in ("fingerprint", "tokenizer") else f" ({getattr(first, name)} and {getattr(other, name)})"
            raise UserError(f"{called} of {first_path} and {path} is not the same{values}; calibrate one of them again", 2)
    if [layer.name for layer in first.layers] != [layer.name for layer in other.layers]:
        raise UserError(f"{first_path} and {path} have different layers; calibrate one of them again", 2)
    for one, two in zip(first.layers, other.layers, strict=True):
        if one.geometry.block != two.geometry.block:
            blocks = f"{one.geometry.block} and {two.geometry.block}"
            raise UserError(f"--block of {first_path} and {path} is not the same ({blocks}); calibrate one of them again", 2)
        if one.error.keys() != two.error.keys():
            told = " and ".join(f"{name} ({', '.join(layer.error)})" for name, layer in ((first_path, one), (path, two)))
            raise UserError(f"{told} measured different formats; calibrate one of them again with the same --formats", 2)


def _layer(layers: Sequence[LayerCalibration], factors: Sequence[float]) -> LayerCalibration:
    first, load = layers[0], whole(factors @ np.array([layer.load for layer in layers]))
    tokens = [factor * layer.tokens for layer, factor in zip(layers, factors, strict=True)]
    sums = _sums([layer.sums for layer in layers if layer.sums], factors, tokens)
    errors, estimated = relative_errors(sums, load)
    return first.model_copy(
        update={
            "load": load.tolist(),
            "text_loads": [loads for layer in layers for loads in layer.text_loads],
            "batch_loads": [loads for layer in layers for loads in layer.batch_loads],
            "dropped": round(sum(factor * layer.dropped for layer, factor in zip(layers, factors, strict=True))),
            "wanda": legible(np.sqrt(factors @ np.square([layer.wanda for layer in layers]))),
            "error": {format: legible(error) for format, error in errors.items()},
            "estimated": np.flatnonzero(estimated).tolist(),
            "sums": sums,
            "stream_share": share(sums),
            "sensitivity": sensitivity(sums, sum(tokens)),
        }
    )


def _dense(several: Sequence[list[DenseCalibration]], factors: Sequence[float]) -> list[DenseCalibration]:
    """The sums of all; nothing if a calibration did not measure the same modules."""
    if any([module.name for module in modules] != [module.name for module in several[0]] for modules in several):
        return []
    return [
        modules[0].model_copy(
            update={
                "error": {
                    format: sum(factor * module.error[format] for module, factor in zip(modules, factors, strict=True))
                    for format in modules[0].error
                },
                "square": sum(factor * module.square for module, factor in zip(modules, factors, strict=True)),
            }
        )
        for modules in zip(*several, strict=True)
    ]


def whole(counts: np.ndarray) -> np.ndarray:
    """``counts`` rounded to int64 with the same sum: those with the largest fractions are rounded up."""
    below = np.floor(counts).astype(np.int64)
    missing = round(float(counts.sum())) - int(below.sum())
    below[np.argsort(below - counts, kind="stable")[:missing]] += 1
    return below


def _sums(several: Sequence[LayerSums], factors: Sequence[float], tokens: Sequence[float]) -> LayerSums:
    """``pairs`` are not weighted, because they say how well an error is known."""
    formats: list[Format] = list(several[0].error)
    return LayerSums(
        pairs=np.sum([sums.pairs for sums in several], axis=0).tolist(),
        energy=(factors @ np.array([sums.energy for sums in several])).tolist(),
        error={format: (factors @ np.array([sums.error[format] for sums in several])).tolist() for format in formats},
        weight_error={
            format: (np.asarray(tokens) @ [sums.weight_error[format] for sums in several] / sum(tokens)).tolist()
            for format in formats
        },
        output_square=sum(factor * sums.output_square for sums, factor in zip(several, factors, strict=True)),
        stream=_sum_of_all([sums.stream for sums in several], factors),
        inverse_stream=_sum_of_all([sums.inverse_stream for sums in several], factors),
    )


def _sum_of_all(values: Sequence[float | None], factors: Sequence[float]) -> float | None:
    """None if one of the values was not measured."""
    known = [value for value in values if value is not None]
    return sum(factor * value for factor, value in zip(factors, known, strict=True)) if len(known) == len(values) else None
