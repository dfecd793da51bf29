"""Shared by the tests of the calibration: texts, random inputs, and the choices of transformers' routers."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.measure import LayerMeasurement, measure_layer
from rq_compile.calibration.schema import Calibration, DenseCalibration

Calibrated = tuple[Calibration, dict[str, np.ndarray]]
LENGTH = 12
LETTERS = np.array([chr(code) for code in range(32, 127)])


def letters(count: int, seed: int) -> str:
    """Text of ``count`` tokens of the tiny tokenizer."""
    return "".join(np.random.default_rng(seed).choice(LETTERS, count))


TEXTS = {"first.txt": letters(5 * LENGTH + 7, 1), "second.txt": letters(3 * LENGTH + 1, 2)}
TOKENS = 8 * LENGTH + 8

SWIGLU = ExpertGeometry(experts=6, top_k=2, hidden=48, intermediate=20, activation="swiglu")


def run(checkpoint: Model, texts: dict[str, str] = TEXTS, batch_size: int = 4, **options: Any) -> Calibration:
    return calibrate(
        checkpoint, texts, batch_size=batch_size, sequence_length=LENGTH, progress=lambda done, total: None, **options
    )[0]


def copied(directory: Path, target: Path, **changes: Any) -> Model:
    """A copy of the checkpoint with another config."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return Model.open(target)


def with_tensor(directory: Path, target: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Model:
    """A copy of the checkpoint in which one tensor is replaced."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return Model.open(target)


def routers_choices(checkpoint: Model, text: str, model: Any = None) -> dict[str, np.ndarray]:
    """The choices of transformers' routers when each sequence runs alone, without padding, ``[tokens * k]`` by experts module."""
    model = model or load_model(checkpoint)
    chosen: dict[str, list[np.ndarray]] = {layer.name: [] for layer in checkpoint.layers}

    def listen(name: str) -> Callable[..., None]:
        def after_router(module: nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
            ids = outputs[2].argmax(-1) if model.config.is_encoder_decoder else outputs[2]
            chosen[name].append(ids.ravel().numpy())

        return after_router

    for name in chosen:
        block: Any = model.get_submodule(name.rpartition(".")[0])
        (block.router if hasattr(block, "router") else block.gate).register_forward_hook(listen(name))
    ids = torch.tensor([4 + ord(letter) - 32 for letter in text])
    for sequence in ids.split(LENGTH):
        if model.config.is_encoder_decoder:
            encoder, rest = sequence[: (len(sequence) + 1) // 2], sequence[(len(sequence) + 1) // 2 :]
            start = torch.tensor([model.config.decoder_start_token_id])
            decoder = torch.cat([start, rest[:-1]])
            if len(rest) == 0:
                model.get_encoder()(input_ids=encoder[None])
            else:
                model(input_ids=encoder[None], decoder_input_ids=decoder[None])
        else:
            model(input_ids=sequence[None])
    return {name: np.concatenate(ids) for name, ids in chosen.items()}


def inputs(geometry: ExpertGeometry, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random hidden states, expert ids (the first expert's most often) and gates."""
    rng = np.random.default_rng(seed)
    skew = np.linspace(2, 0, geometry.experts)
    ids = np.argsort(rng.gumbel(size=(tokens, geometry.experts)) + skew, axis=1)[:, -geometry.top_k :]
    hidden = rng.standard_normal((tokens, geometry.hidden), dtype=np.float32)
    return hidden, ids, rng.random((tokens, geometry.top_k), dtype=np.float32)


def measured(
    checkpoint: Model, layer: MoeLayer, given: tuple[np.ndarray, np.ndarray, np.ndarray], **options: Any
) -> LayerMeasurement:
    return measure_layer(layer.geometry, *given, lambda expert: checkpoint.expert(layer, expert), **options)


def same_dense(one: Sequence[DenseCalibration], other: Sequence[DenseCalibration]) -> None:
    for some, others in zip(one, other, strict=True):
        assert (some.name, some.kind, some.index, some.matrices) == (others.name, others.kind, others.index, others.matrices)
        assert others.square == pytest.approx(some.square, rel=1e-4), some.name
        # A KL divergence is the small difference of large numbers.
        assert others.error == pytest.approx(some.error, rel=2e-2, abs=1e-7 * some.square), some.name


def same(one: Calibrated, other: Calibrated) -> None:
    apart: dict[str, Any] = {"layers": [], "dense": []}
    assert one[0].model_copy(update=apart) == other[0].model_copy(update=apart)
    same_dense(one[0].dense, other[0].dense)
    for whole, streamed in zip(one[0].layers, other[0].layers, strict=True):
        for field in ("name", "geometry", "load", "text_loads", "batch_loads", "dropped", "estimated"):
            assert getattr(whole, field) == getattr(streamed, field), field
        np.testing.assert_allclose(streamed.wanda, whole.wanda, rtol=1e-4)
        for share in ("stream_share", "sensitivity"):
            assert (getattr(streamed, share) or 0) == pytest.approx(getattr(whole, share) or 0, rel=1e-4), share
        for format, error in whole.error.items():
            np.testing.assert_allclose(streamed.error[format], error, rtol=2e-3, atol=1e-13, err_msg=format)
    assert one[1].keys() == other[1].keys()
    for name, moment in one[1].items():
        np.testing.assert_allclose(other[1][name], moment, rtol=0, atol=1e-5 * np.abs(moment).max())
