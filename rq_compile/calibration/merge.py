"""Makes one calibration from several calibrations of a model on different texts, by adding up their counts and measurements.

Counts are exact. Sums and moments are those of all texts together, to fp32 rounding, whatever the order of the calibrations.
Errors were measured on weights that each calibration rounded by its own moments. Two numbers of an expert are not sums: its
weight error, which becomes the mean over tokens, and its Wanda score, whose squares are added, like the squared norms of its
inputs.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path

import numpy as np

from rq_compile import __version__
from rq_compile.calibration.calibrate import legible
from rq_compile.calibration.estimate import relative_errors
from rq_compile.calibration.schema import Calibration, LayerCalibration, LayerSums
from rq_compile.calibration.scratch import on_disk
from rq_compile.calibration.statistics import Statistics
from rq_compile.errors import UserError
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


def merge(calibrations: dict[Path, Calibration]) -> Calibration:
    """The calibration of all texts. ``calibrations`` are given by the files that hold them. ``statistics`` is not set yet.

    Raises:
        UserError: they are of different models, tokenizers, quantizers, blocks or the like, have no sums, or ran the same text.
    """
    (first_path, first), *others = calibrations.items()
    for path, calibration in calibrations.items():
        if any(layer.sums is None for layer in calibration.layers):
            raise UserError(f"{path} {_why_no_sums(calibration)}, so it has no sums to add; calibrate again on texts", 2)
    for path, other in others:
        _check_alike(first, first_path, other, path)
    texts = [text for calibration in calibrations.values() for text in calibration.texts]
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
            "layers": [_layer(layers) for layers in zip(*(calibration.layers for calibration in several), strict=True)],
        }
    )


def merge_statistics(layers: Sequence[LayerCalibration], several: Sequence[Statistics]) -> dict[str, np.ndarray]:
    """The tensors of ``statistics.py``, mapped from temporary files. One layer of one calibration is in memory at a time.

    Raises:
        UserError: see ``Statistics``; or the disk is full.
    """
    return {
        name: on_disk(total)
        for layer in layers
        for name, total in (
            (f"{layer.name}.input_moment", _sum(one.input_moment(layer.name).values for one in several)),
            (f"{layer.name}.intermediate_moment", _sum(one.intermediate_moments(layer.name) for one in several)),
        )
    }


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
            raise UserError(f"{first_path} and {path} measured different formats; calibrate one of them again", 2)


def _layer(layers: Sequence[LayerCalibration]) -> LayerCalibration:
    first, load = layers[0], np.sum([layer.load for layer in layers], axis=0)
    sums = _sums([layer.sums for layer in layers if layer.sums], [layer.tokens for layer in layers])
    errors, estimated = relative_errors(sums, load)
    return first.model_copy(
        update={
            "load": load.tolist(),
            "text_loads": [loads for layer in layers for loads in layer.text_loads],
            "batch_loads": [loads for layer in layers for loads in layer.batch_loads],
            "dropped": sum(layer.dropped for layer in layers),
            "wanda": legible(np.sqrt(np.sum(np.square([layer.wanda for layer in layers]), axis=0))),
            "error": {format: legible(error) for format, error in errors.items()},
            "estimated": np.flatnonzero(estimated).tolist(),
            "sums": sums,
        }
    )


def _sums(several: Sequence[LayerSums], tokens: Sequence[int]) -> LayerSums:
    formats: list[Format] = list(several[0].error)
    return LayerSums(
        pairs=np.sum([sums.pairs for sums in several], axis=0).tolist(),
        energy=np.sum([sums.energy for sums in several], axis=0).tolist(),
        error={format: np.sum([sums.error[format] for sums in several], axis=0).tolist() for format in formats},
        weight_error={
            format: (np.asarray(tokens) @ [sums.weight_error[format] for sums in several] / sum(tokens)).tolist()
            for format in formats
        },
        output_square=sum(sums.output_square for sums in several),
    )
