"""Measured errors, estimates and scores, compared with transformers' experts and plain loops in float64."""

import math
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, get_ident
from time import sleep
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from calibrated import SWIGLU, inputs, measured, run
from torch import nn
from transformers.activations import ACT2FN

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.architectures.layers import ExpertWeights, MoeLayer
from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.calibration import measure, side_by_side
from rq_compile.calibration.estimate import MIN_PAIRS, relative_errors
from rq_compile.calibration.expert import activate
from rq_compile.calibration.measure import measure_layer
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.wanda import WANDA_FRACTION
from rq_compile.files import read_document, write_document
from rq_compile.quantization.quantizer import stored
from rq_compile.quantization.second_moment import SecondMoment


def put(module: Any, expert: int, matrix_up: np.ndarray, matrix_down: np.ndarray) -> None:
    """Give a transformers experts module one expert in canonical layout."""
    up, down = torch.from_numpy(matrix_up), torch.from_numpy(matrix_down)
    if isinstance(module, nn.ModuleDict):
        dense: Any = module[f"expert_{expert}"]
        dense.wi.weight.copy_(up)
        dense.wo.weight.copy_(down)
    elif getattr(module, "gate_up_proj_bias", None) is not None:
        gate, linear = up.chunk(2)
        module.gate_up_proj[expert].copy_(torch.stack([gate, linear], 1).reshape(up.shape).T)
        module.down_proj[expert].copy_(down.T)
    else:
        module.gate_up_proj[expert].copy_(up)
        module.down_proj[expert].copy_(down)


class Reference:
    """transformers' experts of one layer in float64."""

    def __init__(self, checkpoint: Model, layer: MoeLayer) -> None:
        model = load_model(checkpoint)
        if not model.config.is_encoder_decoder:
            model.set_experts_implementation("eager")
        self.module = model.get_submodule(layer.name).double()
        self.layer, self.checkpoint = layer, checkpoint

    def output(self, hidden: np.ndarray, ids: np.ndarray, gates: np.ndarray, **formats: Any) -> np.ndarray:
        """The layer's output when the experts ``e3="int4"`` and so on are stored in a format."""
        for name, format in formats.items():
            weights = self.checkpoint.expert(self.layer, int(name[1:]))
            put(self.module, int(name[1:]), stored(weights.up, format), stored(weights.down, format))
        chosen = torch.from_numpy(ids)
        if isinstance(self.module, nn.ModuleDict):
            chosen = nn.functional.one_hot(chosen, self.layer.geometry.experts)
        found = self.module(torch.from_numpy(hidden).double(), chosen, torch.from_numpy(gates).double()).numpy()
        for name in formats:
            weights = self.checkpoint.expert(self.layer, int(name[1:]))
            put(self.module, int(name[1:]), weights.up, weights.down)
        return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_error_is_what_the_layer_s_output_changes_by(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    """The relative squared change of the whole layer's output when one expert is stored in a format, in float64."""
    checkpoint = Model.open(tiny_checkpoint(family))
    layer = checkpoint.layers[-1]
    given = inputs(layer.geometry, 160)
    found = measured(checkpoint, layer, given, quantizer="nearest")
    errors, estimated = relative_errors(found, found.pairs)
    reference = Reference(checkpoint, layer)
    output = reference.output(*given)
    np.testing.assert_allclose(found.output_square, (output**2).sum(), rtol=1e-5)
    assert (~estimated).sum() >= 2
    for expert in np.flatnonzero(~estimated)[[0, -1]]:
        assert errors["fp32"][expert] == 0
        for format in ("fp16", "bf16", "int8", "int4"):
            stored_in: dict[str, Any] = {f"e{expert}": format}
            changed = reference.output(*given, **stored_in)
            np.testing.assert_allclose(
                errors[format][expert],
                ((changed - output) ** 2).sum() / (output**2).sum(),
                rtol=2e-2 if format == "fp16" else 2e-3,
            )


def test_errors_are_those_of_the_block_that_was_asked_for() -> None:
    """Of an expert that is linear here, with an up projection that every format holds exactly."""
    random, errors = np.random.default_rng(0), {}
    weights = ExpertWeights(np.eye(128, dtype=np.float32), random.standard_normal((128, 128)).astype(np.float32))
    x = np.abs(random.standard_normal((64, 128))).astype(np.float32)
    for block in (128, 32):
        geometry = ExpertGeometry(experts=1, top_k=1, hidden=128, intermediate=128, activation="relu", block=block)
        given = x, np.zeros((64, 1), np.int64), np.ones((64, 1), np.float32)
        errors[block] = measure_layer(geometry, *given, lambda _: weights, quantizer="nearest").error["int4"][0]
        changed = stored(weights.down, "int4", most=block).astype(np.float64) - weights.down
        np.testing.assert_allclose(errors[block], ((x @ changed.T) ** 2).sum(), rtol=1e-4)
    assert errors[32] < 0.8 * errors[128]


@pytest.mark.parametrize(("family", "tolerance"), [("switch_transformers", 1e-3), ("mixtral", 0.1), ("gpt_oss", 0.1)])
def test_errors_add_up(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str, tolerance: float
) -> None:
    """All experts in int4: the layer's relative error is their sum, and is exact if a token has one expert."""
    monkeypatch.setattr(measure, "MAX_PAIRS", 400)
    checkpoint = Model.open(tiny_checkpoint(family))
    layer = checkpoint.layers[0]
    given = inputs(layer.geometry, 400)
    found = measured(checkpoint, layer, given, quantizer="nearest")
    errors, estimated = relative_errors(found, found.pairs)
    assert not estimated.any()
    reference = Reference(checkpoint, layer)
    output = reference.output(*given)
    stored_in: dict[str, Any] = {f"e{expert}": "int4" for expert in range(layer.geometry.experts)}
    changed = reference.output(*given, **stored_in)
    np.testing.assert_allclose(errors["int4"].sum(), ((changed - output) ** 2).sum() / (output**2).sum(), rtol=tolerance)


def float64_intermediate(x: np.ndarray, weights: ExpertWeights, geometry: ExpertGeometry) -> np.ndarray:
    bias = 0 if weights.up_bias is None else weights.up_bias
    rows = x.astype(np.float64) @ weights.up.astype(np.float64).T + bias
    if geometry.activation == "relu":
        return np.maximum(rows, 0)
    gate, up = np.split(rows, 2, axis=1)
    if geometry.activation == "swiglu":
        return gate / (1 + np.exp(-gate)) * up
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    return (up + 1) * gate / (1 + np.exp(-1.702 * gate))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
@pytest.mark.parametrize("fraction", [0.01, WANDA_FRACTION, 1.0])
def test_wanda_score_and_moments_against_a_loop(tiny_checkpoint: Callable[[str], Path], family: str, fraction: float) -> None:
    checkpoint = Model.open(tiny_checkpoint(family))
    layer = checkpoint.layers[0]
    hidden, ids, gates = inputs(layer.geometry, 90)
    found = measured(checkpoint, layer, (hidden, ids, gates), wanda_fraction=fraction)
    for expert in range(layer.geometry.experts):
        weights = checkpoint.expert(layer, expert)
        x = hidden[(ids == expert).any(axis=1)]
        assert found.pairs[expert] == len(x) > 0
        intermediate = float64_intermediate(x, weights, layer.geometry)
        scores = []
        for matrix, seen in ((weights.up, x), (weights.down, intermediate)):
            for column in range(matrix.shape[1]):
                norm = math.sqrt(sum(float(value) ** 2 for value in seen[:, column]))
                scores += [abs(float(weight)) * norm for weight in matrix[:, column]]
        lowest = sorted(scores)[: math.ceil(fraction * len(scores))]
        np.testing.assert_allclose(found.wanda[expert], sum(lowest) / len(lowest), rtol=1e-5)
        moment, width = intermediate.T @ intermediate, found.intermediate_moments.shape[-1]
        for number, block in enumerate(found.intermediate_moments[expert]):
            columns = slice(number * width, (number + 1) * width)
            np.testing.assert_allclose(block, moment[columns, columns], rtol=1e-4, atol=1e-5 * moment.max())
    assert found.input_moment.values.dtype == found.intermediate_moments.dtype == np.float32
    np.testing.assert_allclose(found.input_moment.values, hidden.T.astype(np.float64) @ hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "switch_transformers"])
def test_the_error_measured_is_that_of_the_weights_that_gptq_leaves(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(measure, "MAX_PAIRS", 400)
    checkpoint = Model.open(tiny_checkpoint(family))
    layer = checkpoint.layers[0]
    given = inputs(layer.geometry, 400)
    found = measured(checkpoint, layer, given)
    nearest = measured(checkpoint, layer, given, quantizer="nearest")
    assert all(found.error[format].sum() < nearest.error[format].sum() for format in ("int8", "int4"))
    reference = Reference(checkpoint, layer)
    output = reference.output(*given)
    weights = checkpoint.expert(layer, 1)
    up = stored(weights.up, "int4", found.input_moment)
    down = stored(weights.down, "int4", SecondMoment(found.intermediate_moments[1]))
    put(reference.module, 1, up, down)
    np.testing.assert_allclose(found.error["int4"][1], ((reference.output(*given) - output) ** 2).sum(), rtol=2e-3)


@pytest.mark.parametrize(("activation", "name"), [("geglu", "gelu"), ("geglu_tanh", "gelu_pytorch_tanh"), ("gelu", "gelu")])
def test_activations_of_no_tiny_model(activation: str, name: str) -> None:
    geometry = ExpertGeometry(experts=1, top_k=1, hidden=8, intermediate=5, activation=activation)
    rows = torch.randn(7, geometry.up_rows, generator=torch.Generator().manual_seed(0))
    expected = ACT2FN[name](rows[:, :5]) * (rows[:, 5:] if geometry.up_rows == 10 else 1)
    torch.testing.assert_close(activate(rows, geometry), expected)


def random_experts(geometry: ExpertGeometry, scale: float = 0.2) -> list[ExpertWeights]:
    rng = np.random.default_rng(7)
    up, down = (geometry.up_rows, geometry.hidden), (geometry.hidden, geometry.intermediate)
    return [
        ExpertWeights(scale * rng.standard_normal(up, dtype=np.float32), scale * rng.standard_normal(down, dtype=np.float32))
        for _ in range(geometry.experts)
    ]


def test_an_unreached_expert_is_estimated_as_its_like_would_be() -> None:
    experts = random_experts(SWIGLU)
    hidden, ids, gates = inputs(SWIGLU, 600)
    whole = measure_layer(SWIGLU, hidden, ids, gates, experts.__getitem__)
    expected, none_estimated = relative_errors(whole, whole.pairs)
    assert not none_estimated.any()
    for seen in (0, 5):
        hidden_pairs = np.argwhere(ids == 3)[seen:]
        without = ids.copy()
        without[tuple(hidden_pairs.T)] = -1
        partial = measure_layer(SWIGLU, hidden, without, gates, experts.__getitem__).scaled(whole.pairs, 1.0)
        errors, estimated = relative_errors(partial, whole.pairs)
        assert np.flatnonzero(estimated).tolist() == [3]
        for format in ("fp16", "bf16", "int8", "int4"):
            np.testing.assert_allclose(
                errors[format][3] * partial.output_square, expected[format][3] * whole.output_square, rtol=0.7 if seen else 0.35
            )


@pytest.mark.parametrize("tokens", [1, 3, MIN_PAIRS - 1, MIN_PAIRS])
def test_estimates_are_never_zero_and_never_nan(tokens: int) -> None:
    """All tokens on one expert (and its neighbour): the others have none at all."""
    ids = np.tile([4, 5], (tokens, 1))
    hidden, _, gates = inputs(SWIGLU, tokens)
    found = measure_layer(SWIGLU, hidden, ids, gates, random_experts(SWIGLU).__getitem__)
    errors, estimated = relative_errors(found, found.pairs)
    reached = tokens >= MIN_PAIRS
    assert np.flatnonzero(estimated).tolist() == [0, 1, 2, 3] if reached else estimated.all()
    assert (errors["fp32"] == 0).all()
    for format in ("fp16", "bf16", "int8", "int4"):
        assert np.isfinite(errors[format]).all()
        assert (errors[format] > 0).all()
        # Less than the total error of an expert with tokens, since at most one token is expected of them.
        assert not reached or errors[format][:4].max() < errors[format][4:].min()
    assert (found.wanda[:4] == 0).all()
    assert np.isfinite(found.wanda).all()


def test_an_estimate_where_no_other_expert_changes() -> None:
    """The experts with tokens already hold fp16 values; the expert without tokens does not."""
    experts = random_experts(SWIGLU)
    for expert in range(5):
        experts[expert] = ExpertWeights(stored(experts[expert].up, "fp16"), stored(experts[expert].down, "fp16"))
    hidden, ids, gates = inputs(SWIGLU, 300)
    ids = np.where(ids == 5, -1, ids)
    found = measure_layer(SWIGLU, hidden, ids, gates, experts.__getitem__)
    errors, estimated = relative_errors(found, found.pairs)
    assert np.flatnonzero(estimated).tolist() == [5]
    assert (errors["fp16"][:5] == 0).all()
    assert 0 < errors["fp16"][5] < 1e-6


def test_a_format_that_cannot_hold_a_weight_costs_infinitely(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    experts = random_experts(SWIGLU)
    for expert in (1, 5):
        experts[expert].up[0, 0] = 70000
    hidden, ids, gates = inputs(SWIGLU, 300)
    found = measure_layer(SWIGLU, hidden, np.where(ids == 5, 4, ids), gates, experts.__getitem__)
    errors, _ = relative_errors(found.scaled(found.pairs, 1.0), found.pairs)
    assert np.isinf(errors["fp16"]).tolist() == [False, True, False, False, False, True]
    assert all(np.isfinite(errors[format]).all() for format in ("fp32", "bf16", "int8", "int4"))
    calibration = run(Model.open(tiny_checkpoint("olmoe")))
    fp16 = [*errors["fp16"].tolist(), 0.0, 0.0]  # eight experts
    layer = calibration.layers[0].model_copy(update={"error": {"fp16": fp16}, "sums": None})
    write_document(calibration.model_copy(update={"layers": [layer]}), tmp_path / "c.json")
    assert read_document(Calibration, tmp_path / "c.json").layers[0].error["fp16"] == fp16


def test_a_sample_of_an_expert_s_pairs_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, given = random_experts(SWIGLU), inputs(SWIGLU, 2000)
    whole = measure_layer(SWIGLU, *given, experts.__getitem__)
    monkeypatch.setattr(measure, "MAX_PAIRS", 200)
    sampled = measure_layer(SWIGLU, *given, experts.__getitem__)
    assert (whole.pairs > 200).all()
    for format in ("int8", "int4"):
        assert (whole.error[format] != sampled.error[format]).all()
        np.testing.assert_allclose(sampled.error[format], whole.error[format], rtol=0.3)
        np.testing.assert_allclose(sampled.error[format].sum(), whole.error[format].sum(), rtol=0.1)
    np.testing.assert_array_equal(sampled.wanda, whole.wanda)
    assert sampled.output_square == whole.output_square


@pytest.mark.parametrize("rows", [measure.ROWS_AT_ONCE, 7], ids=["at once", "in parts that are too large to be held"])
@pytest.mark.parametrize("at_once", [2, 5])
def test_experts_that_are_measured_side_by_side_add_up_in_order(monkeypatch: pytest.MonkeyPatch, rows: int, at_once: int) -> None:
    """The first ones come last, and have most tokens: the output is still that of one after another, to the last bit."""
    experts = random_experts(SWIGLU)
    hidden, ids, gates = inputs(SWIGLU, 400)
    ids = np.where(np.arange(400)[:, None] % 2, ids, [0, 1])

    def late(expert: int) -> ExpertWeights:
        if expert < 2:
            sleep(0.02)
        return experts[expert]

    monkeypatch.setattr(measure, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(side_by_side, "AT_ONCE", at_once)
    found = []
    for count in (1, at_once):
        torch.set_num_threads(count)
        output = np.zeros(hidden.shape)
        measured = measure_layer(SWIGLU, hidden, ids, gates, late, output=output)
        found.append((output.tobytes(), measured.sums.model_dump_json(), measured.intermediate_moments.tobytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize(("threads", "at_once"), [(1, 1), (2, 2), (5, 2)])
def test_as_many_run_side_by_side_as_torch_has_threads(threads: int, at_once: int) -> None:
    """They share the threads, of which others have as many as before."""
    begun = Barrier(at_once, timeout=30)
    running: set[int] = set()
    most = []

    def job() -> int:
        running.add(get_ident())
        begun.wait()
        most.append(len(running))
        begun.wait()
        running.discard(get_ident())
        return torch.get_num_threads()

    torch.set_num_threads(threads)
    assert list(side_by_side.side_by_side([job] * 4)) == [threads // at_once] * 4
    assert torch.get_num_threads() == threads
    assert set(most) == {at_once}


def test_an_expert_that_fails_stops_those_beside_it() -> None:
    experts = random_experts(SWIGLU)
    hidden, ids, gates = inputs(SWIGLU, 100)
    experts[1] = ExpertWeights(experts[1].up[:, :-1], experts[1].down)
    with pytest.raises(RuntimeError, match="shapes"):
        measure_layer(SWIGLU, hidden, ids, gates, experts.__getitem__)
