"""How well does GPTQ round, compared with the paper's algorithm in float64? Squared errors of outputs on held-out text.

    python benchmarks/gptq_quality.py [--every 4] [-o benchmarks/results/gptq_quality.json]

Every ``--every``-th expert of each sample model is rounded to int8 and int4 three times: by rq-compile, by Algorithm 1 of the
paper column by column in float64 (`tests/support/gptq_in_float64.py`), and to the nearest, all with moments of the calibration
texts. "error" is the squared error of a matrix's outputs for its inputs on the held-out texts, summed over the experts and
divided by that of the float64 algorithm. The moments of down projections are kept within blocks of columns only, as in a
calibration, for both. A row is a model, a projection and a format.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from calibration import environment
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from gptq_in_float64 import gptq_in_float64

from rq_compile.architectures.activation import activate
from rq_compile.architectures.layers import ExpertWeights
from rq_compile.architectures.model import Model
from rq_compile.calibration.recording import LayerRecording, record
from rq_compile.calibration.text import batches, tokenize
from rq_compile.quantization.formats import MEASURED_FORMATS, Format, block_size
from rq_compile.quantization.quantizer import stored
from rq_compile.quantization.second_moment import SecondMoment, block_moment, whole_moment

MODELS = ("olmoe", "deepseek-v2", "qwen2-moe", "top1")
CHARACTERS = 30_000  # of each text
WAYS = ("rq-compile", "float64", "nearest")


def recordings(model: Model, part: str) -> list[LayerRecording]:
    """Of each layer, on the texts for this part of the work."""
    texts = {path.name: path.read_text()[:CHARACTERS] for path in sorted((ROOT / "samples" / "text").glob(f"*.{part}.txt"))}
    tokens = tokenize(model, texts).of
    cut = list(batches(tokens, batch_size=8, sequence_length=256, measured_tokens=sum(map(len, tokens))))
    return record(model, model.layers, list(texts), cut, lambda done: None)


def inputs(recording: LayerRecording, weights: ExpertWeights, expert: int) -> np.ndarray:
    """What the down projection of an expert multiplies on the expert's own tokens."""
    hidden, ids, _ = recording.measured()
    own = torch.from_numpy(np.array(hidden[(ids == expert).any(1)]))
    bias = None if weights.up_bias is None else torch.from_numpy(weights.up_bias)
    up = F.linear(own, torch.from_numpy(weights.up.astype(np.float32)), bias)
    return activate(up, recording.layer.geometry).numpy()


def by_blocks(weights: np.ndarray, format: Format, moment: SecondMoment, block: int) -> np.ndarray:
    """The paper's algorithm, with a moment that is known whole or within blocks of columns."""
    if moment.whole:
        return gptq_in_float64(weights, format, moment.values.astype(np.float64), block)
    width = moment.values.shape[-1]
    parts = [
        gptq_in_float64(weights[:, start : start + width], format, some[:end, :end].astype(np.float64), block)
        for number, some in enumerate(moment.values)
        for start, end in [(number * width, min(width, weights.shape[1] - number * width))]
    ]
    return np.concatenate(parts, axis=1)


def squared_errors(model: Model, every: int) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """For each projection of some experts and each format: the squared errors of the three ways of rounding."""
    for calibrated, held_out in zip(recordings(model, "calibration"), recordings(model, "heldout"), strict=True):
        layer = calibrated.layer
        # All tokens of a layer: its experts share this moment.
        seen, unseen = (whole_moment(np.array(recording.measured()[0])) for recording in (calibrated, held_out))
        for expert in range(0, layer.geometry.experts, every):
            weights = model.expert(layer, expert)
            up, down = (getattr(weights, projection).astype(np.float32) for projection in ("up", "down"))
            yield from of_matrix("up", up, seen, unseen.values)
            own, other = (inputs(recording, weights, expert) for recording in (calibrated, held_out))
            if len(own) and len(other):
                yield from of_matrix("down", down, block_moment(own, block_size(down.shape[1])), whole_moment(other).values)


def of_matrix(
    projection: str, matrix: np.ndarray, moment: SecondMoment, unseen: np.ndarray
) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    block = block_size(matrix.shape[1])
    for format in MEASURED_FORMATS:
        rounded = stored(matrix, format, moment), by_blocks(matrix, format, moment, block), stored(matrix, format)
        changes = [matrix - some.astype(np.float64) for some in rounded]
        yield (projection, format), np.array([((change @ unseen) * change).sum() for change in changes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    found = []
    for name in MODELS:
        sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(len(WAYS)))
        for key, errors in squared_errors(Model.open(ROOT / "samples" / name), given.every):
            sums[key] += errors
        for (projection, format), (ours, paper, nearest) in sums.items():
            error = {"error": round(ours / paper, 5), "error_nearest": round(nearest / paper, 3)}
            found.append(
                {"model": name, "projection": projection, "format": format, "every": given.every, **error, **environment()}
            )
            print(f"{name:12}{projection:6}{format:6}{ours / paper - 1:+9.3%} of the float64 algorithm's error", flush=True)
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
