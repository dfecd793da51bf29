"""The recurrences of layers without softmax attention, as ONNX Runtime computes them, against float64 step by step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE

from rq_compile.export.recurrent_layers import BegunStates, gated_delta_rule, mamba2_scan

BATCH, HEADS, KEY, VALUE = 2, 4, 8, 6
# Prefill in two pieces, then one token: the state is passed from one to the next.
PIECES = (2500, 1499, 1)
Inputs = dict[str, torch.Tensor]


class Layer(nn.Module):
    """``function`` as a module, which torch exports."""

    def __init__(self, function: Callable[..., Any], names: tuple[str, ...]) -> None:
        super().__init__()
        self.function, self.names = function, names

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(**dict(zip(self.names, inputs, strict=True)))


def engine(function: Callable[..., Any], inputs: Inputs, growing: dict[str, int], path: Path) -> onnxruntime.InferenceSession:
    """``function`` of ``inputs`` in ONNX Runtime; ``growing``: which axis of an input is the sequence."""
    shapes = tuple({growing[name]: torch.export.Dim.AUTO} if name in growing else None for name in inputs)
    torch.onnx.export(
        Layer(function, tuple(inputs)),
        tuple(inputs.values()),
        path,
        input_names=list(inputs),
        dynamic_shapes={"inputs": shapes},
        dynamo=True,
        optimize=False,
        verbose=False,
        custom_translation_table=_ONNX_TRANSLATION_TABLE,
    )
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def in_pieces(session: onnxruntime.InferenceSession, inputs: Inputs, growing: dict[str, int], state: str) -> np.ndarray:
    """The session's results for the whole sequence, run in pieces; the state is its last output."""
    outputs, start, held = [], 0, inputs[state].numpy()
    for size in PIECES:
        piece = {name: value.narrow(growing[name], start, size) if name in growing else value for name, value in inputs.items()}
        feeds = {name: value.numpy() for name, value in piece.items()} | {state: held}
        output, held = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
        outputs.append(output)
        start += size
    return np.concatenate(outputs, axis=growing["output"])


def recurrence(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, decay: np.ndarray, beta: np.ndarray | None, state: np.ndarray
) -> np.ndarray:
    """In float64: ``query``, ``key [batch, T, heads, dk]``, ``value [..., dv]``, ``decay`` (a factor) ``[..., dk]`` or
    ``[..., 1]``, ``beta [batch, T, heads]`` of the delta rule."""
    outputs = []
    for t in range(query.shape[1]):
        state = state * decay[:, t, :, :, None]
        new = value[:, t]
        if beta is not None:
            new = (new - np.einsum("bhk,bhkv->bhv", key[:, t], state)) * beta[:, t, :, None]
        state = state + key[:, t, :, :, None] * new[:, :, None]
        outputs.append(np.einsum("bhk,bhkv->bhv", query[:, t], state))
    return np.stack(outputs, axis=1)


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected[:, -100:]).max() > 1e-2  # the sequence has not died away
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) * 100 + shape[-1]))


@pytest.mark.parametrize("decay_size", [1, KEY], ids=["a decay per head", "a decay per key dimension"])
def test_the_gated_delta_rule(decay_size: int, tmp_path: Path) -> None:
    length = sum(PIECES)
    decays = -F.softplus(random(BATCH, length, HEADS, decay_size)) * 0.05
    inputs = {
        **{"query": random(BATCH, length, HEADS // 2, KEY), "key": random(BATCH, length, HEADS // 2, KEY) + 0.3},
        **{"value": random(BATCH, length, HEADS, VALUE), "g": decays if decay_size > 1 else decays[..., 0]},
        **{"beta": random(BATCH, length, HEADS).sigmoid(), "initial_state": random(BATCH, HEADS, KEY, VALUE)},
    }
    growing = {**dict.fromkeys(("query", "key", "value", "g", "beta"), 1), "output": 1}

    def layer(**named: Any) -> Any:
        return gated_delta_rule(**named, output_final_state=True, use_qk_l2norm_in_kernel=True)

    actual = in_pieces(engine(layer, inputs, growing, tmp_path / "layer.onnx"), inputs, growing, "initial_state")
    exact = {name: value.double().numpy() for name, value in inputs.items()}
    query, key = (
        np.repeat(rows / np.sqrt((rows**2).sum(-1, keepdims=True) + 1e-6), 2, axis=2) for rows in (exact["query"], exact["key"])
    )
    decay = np.exp(decays.double().numpy())
    close(actual, recurrence(query * KEY**-0.5, key, exact["value"], decay, exact["beta"], exact["initial_state"]))


def test_mamba_2(tmp_path: Path) -> None:
    length, groups = sum(PIECES), 2
    inputs = {
        **{"hidden_states": random(BATCH, length, HEADS, VALUE), "dt": random(BATCH, length, HEADS) - 3},
        **{
            "A": -random(HEADS).abs() - 0.1,
            "B": random(BATCH, length, groups, KEY),
            "C": random(BATCH, length, groups, KEY) + 0.1,
        },
        **{"D": random(HEADS), "dt_bias": random(HEADS) * 0.1, "initial_states": random(BATCH, HEADS, VALUE, KEY)},
    }
    growing = {**dict.fromkeys(("hidden_states", "dt", "B", "C"), 1), "output": 1}

    def layer(**named: Any) -> Any:
        return mamba2_scan(**named, chunk_size=64, dt_softplus=True, return_final_states=True)

    actual = in_pieces(engine(layer, inputs, growing, tmp_path / "layer.onnx"), inputs, growing, "initial_states")
    exact = {name: value.double().numpy() for name, value in inputs.items()}
    dt = np.log1p(np.exp(exact["dt"] + exact["dt_bias"]))
    key, query = (np.repeat(exact[name], HEADS // groups, axis=2) for name in ("B", "C"))
    state = exact["initial_states"].transpose(0, 1, 3, 2)
    outputs = recurrence(query, key, exact["hidden_states"] * dt[..., None], np.exp(exact["A"] * dt)[..., None], None, state)
    close(actual, outputs + exact["D"][:, None] * exact["hidden_states"])


def test_mamba(tmp_path: Path) -> None:
    length, channels = sum(PIECES), 12
    inputs = {
        **{"hidden_states": random(BATCH, channels, length), "dt": random(BATCH, channels, length) - 3},
        **{"A": -random(channels, KEY).abs() - 0.1, "B": random(BATCH, KEY, length), "C": random(BATCH, KEY, length) + 0.1},
        **{"D": random(channels), "z": random(BATCH, channels, length), "delta_bias": random(channels) * 0.1},
        "state": random(BATCH, channels, KEY),
    }
    growing = {**dict.fromkeys(("hidden_states", "dt", "B", "C", "z"), 2), "output": 2}

    def layer(state: torch.Tensor, **named: torch.Tensor) -> Any:
        begun = BegunStates()
        begun.state = state
        return begun.scan(**named, delta_softplus=True, return_last_state=True)

    actual = in_pieces(engine(layer, inputs, growing, tmp_path / "layer.onnx"), inputs, growing, "state")
    exact = {name: value.double().numpy() for name, value in inputs.items()}
    dt = np.log1p(np.exp(exact["dt"] + exact["delta_bias"][:, None])).transpose(0, 2, 1)
    x = exact["hidden_states"].transpose(0, 2, 1)
    key, query = (np.repeat(exact[name].transpose(0, 2, 1)[:, :, None], channels, axis=2) for name in ("B", "C"))
    decay = np.exp(dt[..., None] * exact["A"])
    outputs = recurrence(query, key, (x * dt)[..., None], decay, None, exact["state"][..., None])[..., 0]
    gate = exact["z"].transpose(0, 2, 1)
    expected = (outputs + exact["D"] * x) * gate / (1 + np.exp(-gate))
    close(actual.transpose(0, 2, 1), expected)
