"""Calibration against transformers' own routers and experts, and against plain float64 loops."""

import errno
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers.activations import ACT2FN

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.architectures.layers import ExpertWeights, MoeLayer, expert_weights, moe_layers
from rq_compile.architectures.load import load_model
from rq_compile.calibration import calibrate as calibrate_module
from rq_compile.calibration import measure, recording
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.estimate import MIN_PAIRS, relative_errors
from rq_compile.calibration.expert import activate
from rq_compile.calibration.measure import LayerMeasurement, measure_layer
from rq_compile.calibration.recording import LayerRecording, record
from rq_compile.calibration.routing import Routing
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.text import batches, tokenize
from rq_compile.calibration.wanda import WANDA_FRACTION
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.cli.main import main
from rq_compile.errors import UserError
from rq_compile.files import read_document, write_document
from rq_compile.quantization.formats import FORMATS
from rq_compile.quantization.quantizer import stored

LENGTH = 12
LETTERS = np.array([chr(code) for code in range(32, 127)])


def letters(count: int, seed: int) -> str:
    """Text of ``count`` tokens of the tiny tokenizer."""
    return "".join(np.random.default_rng(seed).choice(LETTERS, count))


TEXTS = {"first.txt": letters(5 * LENGTH + 7, 1), "second.txt": letters(3 * LENGTH + 1, 2)}
TOKENS = 8 * LENGTH + 8


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(checkpoint: Checkpoint, texts: dict[str, str] = TEXTS, batch_size: int = 4, **options: float) -> Calibration:
    return calibrate(
        checkpoint, texts, batch_size=batch_size, sequence_length=LENGTH, progress=lambda done, total: None, **options
    )[0]


def copied(directory: Path, target: Path, **changes: object) -> Checkpoint:
    """A copy of the checkpoint with another config."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return Checkpoint.open(target)


def with_tensor(directory: Path, target: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Checkpoint:
    """A copy of the checkpoint in which one tensor is another."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(target)


def routers_choices(checkpoint: Checkpoint, text: str, model: nn.Module | None = None) -> dict[str, np.ndarray]:
    """What transformers' routers choose for each sequence alone, without any padding, ``[tokens * k]`` by experts module."""
    model = model or load_model(checkpoint)
    chosen: dict[str, list[np.ndarray]] = {layer.name: [] for layer in moe_layers(checkpoint)}

    def listen(name: str) -> Callable[..., None]:
        def after_router(module: nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
            ids = outputs[2].argmax(-1) if model.config.is_encoder_decoder else outputs[2]
            chosen[name].append(ids.ravel().numpy())

        return after_router

    for name in chosen:
        block = model.get_submodule(name.rpartition(".")[0])
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


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loads_are_what_transformers_routers_choose(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    found = run(checkpoint)
    assert [layer.name for layer in found.layers] == [layer.name for layer in moe_layers(checkpoint)]
    assert [text.tokens for text in found.texts] == [len(text) for text in TEXTS.values()]
    assert found.tokens == found.measured_tokens == TOKENS
    assert found.padding_tokens > 0
    for number, text in enumerate(TEXTS.values()):
        chosen = routers_choices(checkpoint, text)
        for layer in found.layers:
            expected = np.bincount(chosen[layer.name], minlength=layer.geometry.experts)
            assert layer.text_loads[number] == expected.tolist()
    for layer in found.layers:
        assert layer.load == np.sum(layer.text_loads, axis=0).tolist() == np.sum(layer.batch_loads, axis=0).tolist()
        assert sum(layer.load) == layer.tokens * layer.geometry.top_k
        assert len(layer.batch_loads) == 3
    sides = {layer.name.split(".")[0]: layer.tokens for layer in found.layers}
    assert sum(sides.values()) == TOKENS


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_and_batch_size_change_nothing(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    alone, together = run(checkpoint, batch_size=1), run(checkpoint, batch_size=8)
    assert alone.padding_tokens <= 1 < together.padding_tokens
    for one, many in zip(alone.layers, together.layers, strict=True):
        assert one.text_loads == many.text_loads
        assert len(one.batch_loads) == 10
        assert many.batch_loads == many.text_loads
        for format in FORMATS:
            np.testing.assert_allclose(one.error[format], many.error[format], rtol=1e-2, atol=1e-13)


def inputs(geometry: ExpertGeometry, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random hidden states, expert ids (the first expert's most often) and gates."""
    rng = np.random.default_rng(seed)
    skew = np.linspace(2, 0, geometry.experts)
    ids = np.argsort(rng.gumbel(size=(tokens, geometry.experts)) + skew, axis=1)[:, -geometry.top_k :]
    hidden = rng.standard_normal((tokens, geometry.hidden), dtype=np.float32)
    return hidden, ids, rng.random((tokens, geometry.top_k), dtype=np.float32)


def measured(
    checkpoint: Checkpoint, layer: MoeLayer, given: tuple[np.ndarray, np.ndarray, np.ndarray], fraction: float = WANDA_FRACTION
) -> LayerMeasurement:
    return measure_layer(
        layer.geometry, *given, lambda expert: expert_weights(checkpoint, layer, expert), wanda_fraction=fraction
    )


def put(module: nn.Module, expert: int, up: np.ndarray, down: np.ndarray) -> None:
    """Give a transformers experts module one expert in canonical layout."""
    up, down = torch.from_numpy(up), torch.from_numpy(down)
    if isinstance(module, nn.ModuleDict):
        module[f"expert_{expert}"].wi.weight.copy_(up)
        module[f"expert_{expert}"].wo.weight.copy_(down)
    elif getattr(module, "gate_up_proj_bias", None) is not None:
        gate, linear = up.chunk(2)
        module.gate_up_proj[expert].copy_(torch.stack([gate, linear], 1).reshape(up.shape).T)
        module.down_proj[expert].copy_(down.T)
    else:
        module.gate_up_proj[expert].copy_(up)
        module.down_proj[expert].copy_(down)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_recorded_gives_the_layer_s_output(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Recorded with padding, inputs, ids and gates give the output that transformers has without; Switch drops most tokens."""
    checkpoint = copied(tiny_checkpoint(family), tmp_path / "model", expert_capacity=1)
    layers, text = moe_layers(checkpoint), TEXTS["second.txt"]
    cut = batches(
        tokenize(checkpoint, {"a": text}),
        batch_size=4,
        sequence_length=LENGTH,
        measured_tokens=len(text),
        decoder_start=2 if family == "switch_transformers" else None,
    )
    recordings = record(checkpoint, layers, ["a"], cut, lambda done: None)
    model = load_model(checkpoint)
    expected = dict.fromkeys((layer.name for layer in layers), 0.0)
    for name in expected:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: expected.update({name: expected[name] + float(output.square().sum())})
        )
    routers_choices(checkpoint, text, model)
    for recorded in recordings:
        assert family != "switch_transformers" or recorded.dropped > 0
        found = measured(checkpoint, recorded.layer, recorded.measured())
        np.testing.assert_allclose(found.output_square, expected[recorded.layer.name], rtol=1e-4)


class Reference:
    """transformers' experts of one layer in float64."""

    def __init__(self, checkpoint: Checkpoint, layer: MoeLayer) -> None:
        model = load_model(checkpoint)
        if not model.config.is_encoder_decoder:
            model.set_experts_implementation("eager")
        self.module = model.get_submodule(layer.name).double()
        self.layer, self.checkpoint = layer, checkpoint

    def output(self, hidden: np.ndarray, ids: np.ndarray, gates: np.ndarray, **formats: str) -> np.ndarray:
        """The layer's output when the experts ``e3="int4"`` and so on are stored in a format."""
        for name, format in formats.items():
            weights = expert_weights(self.checkpoint, self.layer, int(name[1:]))
            put(self.module, int(name[1:]), stored(weights.up, format), stored(weights.down, format))
        chosen = torch.from_numpy(ids)
        if isinstance(self.module, nn.ModuleDict):
            chosen = nn.functional.one_hot(chosen, self.layer.geometry.experts)
        found = self.module(torch.from_numpy(hidden).double(), chosen, torch.from_numpy(gates).double()).numpy()
        for name in formats:
            weights = expert_weights(self.checkpoint, self.layer, int(name[1:]))
            put(self.module, int(name[1:]), weights.up, weights.down)
        return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_error_is_what_the_layer_s_output_changes_by(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    """One expert in a format: the relative squared change of the whole layer's output, in float64."""
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    layer = moe_layers(checkpoint)[-1]
    given = inputs(layer.geometry, 160)
    found = measured(checkpoint, layer, given)
    errors, estimated = relative_errors(found, found.pairs)
    reference = Reference(checkpoint, layer)
    output = reference.output(*given)
    np.testing.assert_allclose(found.output_square, (output**2).sum(), rtol=1e-5)
    assert (~estimated).sum() >= 2
    for expert in np.flatnonzero(~estimated)[[0, -1]]:
        assert errors["fp32"][expert] == 0
        for format in ("fp16", "bf16", "int8", "int4"):
            changed = reference.output(*given, **{f"e{expert}": format})
            np.testing.assert_allclose(
                errors[format][expert],
                ((changed - output) ** 2).sum() / (output**2).sum(),
                rtol=2e-2 if format == "fp16" else 2e-3,
            )


@pytest.mark.parametrize(("family", "tolerance"), [("switch_transformers", 1e-3), ("mixtral", 0.1), ("gpt_oss", 0.1)])
def test_errors_add_up(tiny_checkpoint: Callable[[str], Path], family: str, tolerance: float) -> None:
    """All experts in int4: the layer's relative error is their sum, exactly where a token has one expert."""
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    layer = moe_layers(checkpoint)[0]
    given = inputs(layer.geometry, 400)
    found = measured(checkpoint, layer, given)
    errors, estimated = relative_errors(found, found.pairs)
    assert not estimated.any()
    reference = Reference(checkpoint, layer)
    output = reference.output(*given)
    changed = reference.output(*given, **{f"e{expert}": "int4" for expert in range(layer.geometry.experts)})
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
def test_wanda_score_and_statistics_against_a_loop(tiny_checkpoint: Callable[[str], Path], family: str, fraction: float) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    layer = moe_layers(checkpoint)[0]
    hidden, ids, gates = inputs(layer.geometry, 90)
    found = measured(checkpoint, layer, (hidden, ids, gates), fraction)
    for expert in range(layer.geometry.experts):
        weights = expert_weights(checkpoint, layer, expert)
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
        np.testing.assert_allclose(found.input_square_sum[expert], (x.astype(np.float64) ** 2).sum(0), rtol=1e-5)
        np.testing.assert_allclose(found.intermediate_square_sum[expert], (intermediate**2).sum(0), rtol=1e-4, atol=1e-6)
    assert found.input_square_sum.dtype == found.intermediate_square_sum.dtype == np.float32


@pytest.mark.parametrize(("activation", "name"), [("geglu", "gelu"), ("geglu_tanh", "gelu_pytorch_tanh"), ("gelu", "gelu")])
def test_activations_of_no_tiny_model(activation: str, name: str) -> None:
    geometry = ExpertGeometry(experts=1, top_k=1, hidden=8, intermediate=5, activation=activation)
    rows = torch.randn(7, geometry.up_rows, generator=torch.Generator().manual_seed(0))
    expected = ACT2FN[name](rows[:, :5]) * (rows[:, 5:] if geometry.up_rows == 10 else 1)
    torch.testing.assert_close(activate(rows, geometry), expected)


SWIGLU = ExpertGeometry(experts=6, top_k=2, hidden=48, intermediate=20, activation="swiglu")


def random_experts(geometry: ExpertGeometry, scale: float = 0.2) -> list[ExpertWeights]:
    rng = np.random.default_rng(7)
    shapes = ((geometry.up_rows, geometry.hidden), (geometry.hidden, geometry.intermediate))
    return [
        ExpertWeights(*(scale * rng.standard_normal(shape, dtype=np.float32) for shape in shapes))
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
        # Less than what a reached expert suffers in all, as no more than a token is expected of them.
        assert not reached or errors[format][:4].max() < errors[format][4:].min()
    assert (found.wanda[:4] == 0).all()
    assert np.isfinite(found.wanda).all()


def test_an_estimate_where_no_other_expert_changes() -> None:
    """The reached experts hold fp16 values already; the unreached one does not."""
    experts = random_experts(SWIGLU)
    for expert in range(5):
        experts[expert] = ExpertWeights(*(stored(matrix, "fp16") for matrix in (experts[expert].up, experts[expert].down)))
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
    calibration = run(Checkpoint.open(tiny_checkpoint("olmoe")))
    layer = calibration.layers[0].model_copy(update={"error": {"fp16": errors["fp16"].tolist()}})
    write_document(calibration.model_copy(update={"layers": [layer]}), tmp_path / "c.json")
    assert read_document(Calibration, tmp_path / "c.json").layers[0].error["fp16"] == errors["fp16"].tolist()


def test_a_sample_of_an_expert_s_pairs_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, given = random_experts(SWIGLU), inputs(SWIGLU, 2000)
    whole = measure_layer(SWIGLU, *given, experts.__getitem__)
    monkeypatch.setattr(measure, "MAX_PAIRS", 200)
    sampled = measure_layer(SWIGLU, *given, experts.__getitem__)
    assert (whole.pairs > 200).all()
    for format in ("int8", "int4"):
        assert (whole.error[format] != sampled.error[format]).all()
        np.testing.assert_allclose(sampled.error[format], whole.error[format], rtol=0.15)
    np.testing.assert_array_equal(sampled.wanda, whole.wanda)
    assert sampled.output_square == whole.output_square


def test_long_texts_are_counted_whole_and_measured_in_part(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("mixtral"))
    texts = {"long.txt": letters(2400, 3), "other.txt": letters(1200, 4)}

    def both() -> tuple[Calibration, dict[str, np.ndarray]]:
        return calibrate(checkpoint, texts, batch_size=16, sequence_length=64, progress=lambda done, total: None)

    whole, statistics = both()
    monkeypatch.setattr(calibrate_module, "MAX_RECORDED_BYTES", 1000 * 2 * 32 * 4)
    part, scaled = both()
    assert (whole.measured_tokens, part.measured_tokens, part.tokens) == (3600, 1000, 3600)
    for one, other in zip(whole.layers, part.layers, strict=True):
        assert one.load == other.load
        np.testing.assert_allclose(one.error["int4"], other.error["int4"], rtol=0.3)
        np.testing.assert_allclose(one.wanda, other.wanda, rtol=0.1)
        assert one.error != other.error
    for name, sums in statistics.items():
        np.testing.assert_allclose(sums.sum(1), scaled[name].sum(1), rtol=0.3)


def test_an_even_sample_has_the_tokens_asked_for() -> None:
    texts = [np.arange(50), np.arange(31)]
    for wanted in (1, 7, 40, 80, 81, 200):
        cut = list(batches(texts, batch_size=3, sequence_length=8, measured_tokens=wanted, decoder_start=5))
        rows = [side for batch in cut for side in batch.sides]
        assert sum(side.measured.sum() for side in rows) == min(wanted, 81)
        assert not any((side.measured & ~side.real).any() for side in rows)
        assert sum(batch.tokens for batch in cut) == 81
    halves = [batch for batch in cut if batch.text == 0]
    assert halves[0].encoder.ids[:2].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert halves[0].decoder.ids[:2].tolist() == [[5, 4, 5, 6], [5, 12, 13, 14]]
    # The last sequence has two tokens, one for each side; the one of the other text before it has seven.
    assert (halves[-1].encoder.ids.tolist(), halves[-1].decoder.ids.tolist()) == ([[48]], [[5]])
    assert cut[-1].encoder.ids.tolist() == [[24, 25, 26, 27]]
    assert cut[-1].decoder.ids.tolist() == [[5, 28, 29]]


def test_statistics_are_of_the_experts_inputs(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("qwen3_moe"))
    found, statistics = calibrate(checkpoint, TEXTS, batch_size=2, sequence_length=LENGTH, progress=lambda done, total: None)
    assert {name: array.shape for name, array in statistics.items()} == {
        f"{layer.name}.{kind}": (8, 32) for layer in found.layers for kind in ("input_square_sum", "intermediate_square_sum")
    }
    model = load_model(checkpoint)
    seen = {layer.name: np.zeros(32) for layer in found.layers}
    for layer in found.layers:
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, inputs, name=layer.name: seen.update({name: seen[name] + 2 * (inputs[0].double() ** 2).sum(0).numpy()})
        )
    for text in TEXTS.values():
        for sequence in torch.tensor([4 + ord(letter) - 32 for letter in text]).split(LENGTH):
            model(input_ids=sequence[None])
    for name, squares in seen.items():
        np.testing.assert_allclose(statistics[f"{name}.input_square_sum"].sum(0), squares, rtol=1e-4)


def test_the_same_bytes_twice(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("deepseek_v3"))
    (first, one), (second, other) = (
        calibrate(checkpoint, TEXTS, batch_size=4, sequence_length=LENGTH, progress=lambda done, total: None) for _ in range(2)
    )
    assert first.model_dump_json() == second.model_dump_json()
    assert {name: array.tobytes() for name, array in one.items()} == {name: array.tobytes() for name, array in other.items()}


def test_progress_ends_with_all_tokens(tiny_checkpoint: Callable[[str], Path]) -> None:
    told: list[tuple[int, int]] = []
    calibrate(
        Checkpoint.open(tiny_checkpoint("switch_transformers")),
        TEXTS,
        batch_size=2,
        sequence_length=LENGTH,
        progress=lambda *both: told.append(both),
    )
    assert told == sorted(told)
    assert {total for _, total in told} == {TOKENS}
    assert told[-1][0] == TOKENS
    assert 0 < told[0][0] < TOKENS / 2


def test_tokens_that_switch_drops_are_load_and_are_counted(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied(tiny_checkpoint("switch_transformers"), tmp_path / "model", expert_capacity=1)
    found = run(checkpoint)
    layer = found.layers[0]
    assert layer.name.startswith("encoder")
    kept = 0
    for text in TEXTS.values():
        ids = routers_choices(checkpoint, text)[layer.name]
        encoder_rows = [(len(text[start : start + LENGTH]) + 1) // 2 for start in range(0, len(text), LENGTH)]
        for row in np.split(ids, np.cumsum(encoder_rows)[:-1]):
            kept += len(set(row.tolist()))
    assert 0 < layer.dropped == sum(layer.load) - kept
    assert sum(layer.load) == layer.tokens
    # An expert whose tokens are all dropped has nothing to lose: the drops carry no error.
    roomy = run(Checkpoint.open(tiny_checkpoint("switch_transformers")))
    assert roomy.layers[0].dropped == 0
    assert layer.load == roomy.layers[0].load
    hidden, ids, gates = inputs(layer.geometry, 60)
    gates[ids == 0] = 0
    first = moe_layers(checkpoint)[0]
    assert measured(checkpoint, first, (hidden, ids, gates)).error["int4"][0] == 0


def test_what_the_calibration_says_of_itself(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    found = run(checkpoint, wanda_fraction=0.25)
    assert (found.model, found.model_type, found.dtype) == ("olmoe", "olmoe", "fp32")
    assert found.fingerprint == checkpoint.fingerprint
    assert (found.wanda_fraction, found.batch_size, found.sequence_length) == (0.25, 4, LENGTH)
    assert found.texts[0].sha256 != found.texts[1].sha256
    assert set(found.layers[0].error) == set(FORMATS)
    write_document(found, tmp_path / "c.json")
    assert read_document(Calibration, tmp_path / "c.json") == found


def test_command(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS["first.txt"])
    (tmp_path / "b.txt").write_text(TEXTS["second.txt"])
    texts = ["--text", str(tmp_path / "a.txt"), "--text", str(tmp_path / "b.txt"), "--sequence-length", "16"]
    result = CliRunner().invoke(main, ["calibrate", str(tiny_checkpoint("olmoe")), *texts, "-o", str(tmp_path / "c.json")])
    assert result.exit_code == 0, result.output
    found = read_document(Calibration, tmp_path / "c.json")
    assert found.wanda_fraction == WANDA_FRACTION
    assert len(load_file(tmp_path / found.statistics)) == 4
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "c.json")]).output
    assert "2 layers of 8 experts, top-2" in shown
    assert "all in int4" in shown


def refused(checkpoint: Checkpoint, match: str, texts: dict[str, str] = TEXTS) -> None:
    with pytest.raises(UserError, match=match):
        run(checkpoint, texts)


def test_refuses_texts_that_are_none(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    refused(checkpoint, "there is no text to calibrate on", {})
    refused(checkpoint, r"empty\.txt has 0 tokens, but a calibration needs at least 2; give a longer", {"empty.txt": ""})
    refused(checkpoint, r"short\.txt has 1 tokens", {**TEXTS, "short.txt": "a"})


def test_two_tokens_are_enough(tiny_checkpoint: Callable[[str], Path]) -> None:
    for family in ("gpt_oss", "switch_transformers"):
        found = run(Checkpoint.open(tiny_checkpoint(family)), {"two.txt": "ab"})
        for layer in found.layers:
            assert layer.estimated == list(range(layer.geometry.experts))
            assert all(0 < error < math.inf for error in layer.error["int8"])


def test_refuses_a_checkpoint_without_tokenizer(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied(tiny_checkpoint("olmoe"), tmp_path / "model")
    (checkpoint.path / "tokenizer.json").write_text("{}")
    refused(checkpoint, r"tokenizer\.json cannot be read: .*; download it again")
    (checkpoint.path / "tokenizer.json").unlink()
    refused(checkpoint, r"has no tokenizer\.json; copy the model's")


def test_refuses_another_model_s_tokenizer(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied(tiny_checkpoint("olmoe"), tmp_path / "model", vocab_size=64)
    refused(checkpoint, r"gives the token 98, but the model knows 64 tokens \(0-63\)", {"a.txt": "~~"})


def test_a_tokenizer_that_truncates_does_not(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied(tiny_checkpoint("olmoe"), tmp_path / "model")
    tokenizer = tiny.tokenizer().backend_tokenizer
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(checkpoint.path / "tokenizer.json"))
    assert [len(ids) for ids in tokenize(checkpoint, TEXTS)] == [len(text) for text in TEXTS.values()]


def test_refuses_sequences_that_the_model_cannot_read(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied(tiny_checkpoint("olmoe"), tmp_path / "model", max_position_embeddings=LENGTH - 1)
    refused(checkpoint, "--sequence-length 12 is more than the model's 11 positions; choose a smaller one")


def test_names_the_first_layer_that_is_not_finite(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    checkpoint = with_tensor(tiny_checkpoint("olmoe"), tmp_path / "model", name, lambda old: old * np.float32(np.nan))
    refused(
        checkpoint, r"the input of model\.layers\.1\.mlp\.experts is not finite on first\.txt; check the checkpoint's weights"
    )


def test_names_the_expert_whose_weight_is_not_finite(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("olmoe"))
    texts = {"two.txt": "ab"}
    unreached = run(checkpoint, texts).layers[1].load.index(0)
    name = f"model.layers.1.mlp.experts.{unreached}.up_proj.weight"
    checkpoint = with_tensor(checkpoint.path, tmp_path / "model", name, lambda old: old * np.float32(np.inf))
    refused(checkpoint, rf"expert {unreached} of model\.layers\.1\.mlp\.experts has a weight that is not finite; repair", texts)


def test_refuses_a_layer_that_gives_nothing(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint("granitemoe"), tmp_path / "model")
    name = "model.layers.1.block_sparse_moe.output_linear.weight"
    checkpoint = with_tensor(tiny_checkpoint("granitemoe"), tmp_path / "zero", name, np.zeros_like)
    refused(checkpoint, r"the squared norm of what model\.layers\.1\.block_sparse_moe\.experts gives .* is 0, so that no error")


def test_refuses_a_layer_that_was_bypassed(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    watch = recording.watch

    def watch_others(model: nn.Module, layer: MoeLayer, receive: Callable[[Routing], None]) -> None:
        if layer.index != 1:
            watch(model, layer, receive)

    monkeypatch.setattr(recording, "watch", watch_others)
    refused(
        Checkpoint.open(tiny_checkpoint("mixtral")),
        r"model\.layers\.1\.mlp\.experts routed 0 \(token, choice\) pairs of a batch of first\.txt where 48 tokens",
    )


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (np.full((4, 2), 6), "routed 0 .* 3 tokens x top-k 2 = 6 were expected"),
        (np.full((4, 1), 5), "routed 3 .* 3 tokens x top-k 2 = 6 were expected"),
        (np.full((5, 2), 5), "was given 5 tokens of a batch of 4, so that padding cannot be told from text"),
    ],
)
def test_refuses_routing_that_does_not_sum_up(ids: np.ndarray, match: str) -> None:
    layer = LayerRecording(MoeLayer("some.experts", 3, SWIGLU), ["a.txt"])
    (batch,) = batches([np.arange(3)], batch_size=1, sequence_length=4, measured_tokens=3)
    padded = type(batch.decoder)(*(np.pad(array, ((0, 0), (0, 1))) for array in vars(batch.decoder).values()))

    def a_batch() -> None:
        layer.begin(type(batch)(0, padded))
        layer.receive(Routing(torch.zeros(len(ids), 48), torch.from_numpy(ids), torch.ones(ids.shape)))
        layer.end()

    with pytest.raises(UserError, match=rf"some\.experts {match}"):
        a_batch()


def test_says_where_the_disk_is_full(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recording.tempfile, "TemporaryFile", lambda prefix: Full())
    refused(
        Checkpoint.open(tiny_checkpoint("phimoe")),
        rf"cannot keep the inputs of model\.layers\.0\.mlp\.experts in {tempfile.gettempdir()}: No space left on device; free",
    )
