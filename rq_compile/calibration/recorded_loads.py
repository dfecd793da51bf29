"""Replaces the loads of a calibration by loads that a serving system recorded, so that real traffic can be planned for.

SGLang's expert distribution recorder dumps ``{"logical_count": [steps, layers, m] or [layers, m]}`` (``.pt``, or ``.json`` after
a conversion), with a row for every decoder layer. TensorRT-LLM's ``EXPERT_STATISTIC_PATH`` is a folder of
``rank<n>.safetensors``, whose tensors ``"<iteration>_<layer>"`` count the rank's own tokens, int ``[m]``. Layers are numbered as
in the model.
"""

import hashlib
import json
import pickle
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rq_compile.bounds import MOST_COUNTED
from rq_compile.calibration.schema import Calibration, CalibrationText, LayerCalibration
from rq_compile.errors import UserError
from rq_compile.files import sha256

# Decoder layer -> the counts of every recorded step, int64 [steps, m].
Recorded = dict[int, np.ndarray]


def with_recorded_loads(calibration: Calibration, paths: list[Path]) -> Calibration:
    """``calibration`` with the loads of ``paths``. Each path counts as a separate text, and each recorded step as a batch.

    An expert's ``error``, a sum over its tokens, is scaled with its share of the layer's tokens. The other measurements (the
    Wanda score and the activation statistics) stay unchanged, and so do the batch size and the sequence length.

    Raises:
        UserError: two of ``paths`` have the same name, or a file cannot be read, has an unknown format, or does not have the
            model's layers and experts.
    """
    for path in paths:
        if [other.name for other in paths].count(path.name) > 1:
            raise UserError(f"two --from-loads are named {path.name}; rename one, because results are listed by name", 2)
    recorded = {path: read_loads(path) for path in paths}
    for path, loads in recorded.items():
        _check_layers(loads, {layer.index for layer in calibration.layers}, path)
    layers, tokens = [], np.zeros(len(paths), np.int64)
    for layer in calibration.layers:
        steps = [_of_layer(loads, layer, path) for path, loads in recorded.items()]
        layers.append(_with_loads(layer, steps))
        tokens = np.maximum(tokens, [step.sum() // layer.geometry.top_k for step in steps])
    texts = [
        CalibrationText(name=path.name, sha256=_digest(path), tokens=int(count))
        for path, count in zip(paths, tokens, strict=True)
    ]
    counted = {"tokens": int(tokens.sum()), "measured_tokens": 0, "padding_tokens": 0}
    return calibration.model_copy(update={"layers": layers, "texts": texts, **counted})


def read_loads(path: Path) -> Recorded:
    """
    Raises:
        UserError: ``path`` cannot be read or has an unknown format.
    """
    try:
        if path.is_dir():
            return _tensorrt_llm(path)
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        return _sglang(content, path)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it does not hold recorded loads"
        raise UserError(
            f"cannot read {path}: {reason}; give a dump of SGLang's recorder (.pt, .json) or TensorRT-LLM's statistics folder",
            2,
        ) from error


def _sglang(content: object, path: Path) -> Recorded:
    counts = content.get("logical_count") if isinstance(content, dict) else None
    if counts is None:
        raise ValueError("no logical_count")
    table = _counts(counts, path)
    if table.ndim == 2:
        table = table[None]
    if table.ndim != 3:
        raise ValueError(f"logical_count of {table.ndim} dimensions")
    return {layer: table[:, layer] for layer in range(table.shape[1])}


def _tensorrt_llm(folder: Path) -> Recorded:
    ranks = sorted(path for path in folder.iterdir() if re.fullmatch(r"rank\d+\.safetensors", path.name))
    steps: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for rank in ranks:
        for name, values in load_file(rank).items():
            if not re.fullmatch(r"\d+_\d+", name) or values.ndim != 1:
                raise ValueError(name)
            iteration, layer = map(int, name.split("_"))
            counts = _counts(values, rank)
            known = steps[layer].get(iteration, np.zeros_like(counts))
            steps[layer][iteration] = _counts(known + counts, rank)
    if not steps:
        raise ValueError("no rank<n>.safetensors")
    return {layer: np.stack([of[iteration] for iteration in sorted(of)]) for layer, of in steps.items()}


def _counts(values: object, path: Path) -> np.ndarray:
    """int64.

    Raises:
        UserError: a count is negative or not an integer.
    """
    table = np.asarray(values)
    if table.dtype == object or (table.dtype.kind in "iuf" and (table > MOST_COUNTED).any()):
        raise UserError(f"{path} counts more than 2^53 tokens of an expert, or something else; record the loads again", 2)
    if table.dtype.kind not in "iuf" or not (table >= 0).all() or not (table == np.floor(table)).all() or np.isinf(table).any():
        raise UserError(f"{path} has a count that is negative or not a whole number; record the loads again", 2)
    return table.astype(np.int64)


def _check_layers(recorded: Recorded, expected: set[int], path: Path) -> None:
    """
    Raises:
        UserError: a layer with experts is missing, or another layer counts tokens, so the loads are of another model.
    """
    if missing := expected - recorded.keys():
        known = f"layers {min(recorded)}-{max(recorded)}" if recorded else "no layers"
        raise UserError(f"{path} has {known}, but MODEL has experts in layer {min(missing)}; give loads recorded of MODEL", 2)
    if others := sorted(layer for layer in recorded.keys() - expected if recorded[layer].any()):
        raise UserError(f"{path} counts tokens in layer {others[0]}, where MODEL has no experts; give loads recorded of MODEL", 2)


def _of_layer(recorded: Recorded, layer: LayerCalibration, path: Path) -> np.ndarray:
    """Counts of the steps in which the layer got tokens, int64 ``[steps, m]``."""
    steps, experts = recorded[layer.index], layer.geometry.experts
    if steps.shape[1] != experts:
        raise UserError(f"{path} counts {steps.shape[1]} experts, but MODEL has {experts}; give loads recorded of MODEL", 2)
    steps = steps[steps.any(axis=1)]
    if not len(steps):
        raise UserError(f"{path} counts no token in layer {layer.index}, which has experts; record while MODEL serves", 2)
    return steps


def _with_loads(layer: LayerCalibration, texts: list[np.ndarray]) -> LayerCalibration:
    # Sums of doubles do not wrap around.
    if (total := float(sum(steps.astype(np.float64).sum() for steps in texts))) > MOST_COUNTED:
        raise UserError(
            f"the recorded loads of layer {layer.index} add up to {total:.3g} tokens, more than 2^53; record the loads again", 2
        )
    load = np.sum([steps.sum(axis=0) for steps in texts], axis=0)
    before = np.asarray(layer.load)
    # As in the estimation of errors, an expert without tokens counts as having one.
    growth = (np.maximum(load, 1) / load.sum()) / (np.maximum(before, 1) / max(1, before.sum()))
    return layer.model_copy(
        update={
            "load": load.tolist(),
            "text_loads": [steps.sum(axis=0).tolist() for steps in texts],
            "batch_loads": np.concatenate(texts).tolist(),
            "dropped": 0,
            "sums": None,
            "error": {format: (np.asarray(error) * growth).tolist() for format, error in layer.error.items()},
        }
    )


def _digest(path: Path) -> str:
    """The hash of a file's content, or of the names and contents of a folder's files."""
    if not path.is_dir():
        return sha256(path)
    listing = "".join(f"{sha256(file)}  {file.name}\n" for file in sorted(path.iterdir()) if file.is_file())
    return hashlib.sha256(listing.encode()).hexdigest()
