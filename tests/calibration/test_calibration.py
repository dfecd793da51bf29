"""Calibration end to end, against transformers' own routers and experts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from calibrated import LENGTH, TEXTS, TOKENS, copied, inputs, letters, measured, routers_choices, run
from click.testing import CliRunner
from safetensors.numpy import load_file

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.calibration import calibrate as calibrate_module
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.recording import record
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.text import batches, tokenize
from rq_compile.calibration.wanda import WANDA_FRACTION
from rq_compile.cli.main import main
from rq_compile.files import read_document, write_document
from rq_compile.quantization.formats import FLOAT_FORMATS, MEASURED_FORMATS

# The formats that weights are rounded to; others only hold what a checkpoint stores in them.
ROUNDED = [*FLOAT_FORMATS, *MEASURED_FORMATS]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loads_are_what_transformers_routers_choose(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    checkpoint = Model.open(tiny_checkpoint(family))
    found = run(checkpoint)
    assert [layer.name for layer in found.layers] == [layer.name for layer in checkpoint.layers]
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
    checkpoint = Model.open(tiny_checkpoint(family))
    alone, together = run(checkpoint, batch_size=1), run(checkpoint, batch_size=8)
    assert alone.padding_tokens <= 1 < together.padding_tokens
    for one, many in zip(alone.layers, together.layers, strict=True):
        assert one.text_loads == many.text_loads
        assert len(one.batch_loads) == 10
        assert many.batch_loads == many.text_loads
        for format in ROUNDED:
            np.testing.assert_allclose(one.error[format], many.error[format], rtol=1e-2, atol=1e-13)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_recorded_gives_the_layer_s_output(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Recorded with padding, inputs, ids and gates give the output that transformers has without; Switch drops most tokens."""
    checkpoint = copied(tiny_checkpoint(family), tmp_path / "model", expert_capacity=1)
    layers, text = checkpoint.layers, TEXTS["second.txt"]
    cut = batches(
        tokenize(checkpoint, {"a": text}).of,
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


def test_long_texts_are_counted_whole_and_measured_in_part(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Model.open(tiny_checkpoint("mixtral"))
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
    for name, moment in statistics.items():
        diagonal, of_a_sample = (values.diagonal(axis1=-2, axis2=-1).sum(-1) for values in (moment, scaled[name]))
        np.testing.assert_allclose(diagonal, of_a_sample, rtol=0.3)


def test_an_even_sample_has_the_tokens_asked_for() -> None:
    texts = [np.arange(50), np.arange(31)]
    for wanted in (1, 7, 40, 80, 81, 200):
        cut = list(batches(texts, batch_size=3, sequence_length=8, measured_tokens=wanted, decoder_start=5))
        rows = [side for batch in cut for side in batch.sides]
        assert sum(side.measured.sum() for side in rows) == min(wanted, 81)
        assert not any((side.measured & ~side.real).any() for side in rows)
        assert sum(batch.tokens for batch in cut) == 81
    halves = [batch for batch in cut if batch.text == 0]
    assert halves[0].encoder
    assert halves[-1].encoder
    assert cut[-1].encoder
    assert halves[0].encoder.ids[:2].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert halves[0].decoder.ids[:2].tolist() == [[5, 4, 5, 6], [5, 12, 13, 14]]
    # The last sequence has two tokens, one for each side; the one of the other text before it has seven.
    assert (halves[-1].encoder.ids.tolist(), halves[-1].decoder.ids.tolist()) == ([[48]], [[5]])
    assert cut[-1].encoder.ids.tolist() == [[24, 25, 26, 27]]
    assert cut[-1].decoder.ids.tolist() == [[5, 28, 29]]


def test_statistics_are_of_the_experts_inputs(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Model.open(tiny_checkpoint("qwen3_moe"))
    found, statistics = calibrate(checkpoint, TEXTS, batch_size=2, sequence_length=LENGTH, progress=lambda done, total: None)
    shapes = {"input_moment": (32, 32), "intermediate_moment": (8, 1, 32, 32)}
    of_experts = {name: array.shape for name, array in statistics.items() if ".experts." in name}
    assert of_experts == {f"{layer.name}.{kind}": shape for layer in found.layers for kind, shape in shapes.items()}
    model = load_model(checkpoint)
    seen = {layer.name: np.zeros((32, 32)) for layer in found.layers}
    for layer in found.layers:
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, inputs, name=layer.name: seen.update({name: seen[name] + (inputs[0].T @ inputs[0]).numpy()})
        )
    for text in TEXTS.values():
        for sequence in torch.tensor([4 + ord(letter) - 32 for letter in text]).split(LENGTH):
            model(input_ids=sequence[None])
    for name, products in seen.items():
        np.testing.assert_allclose(statistics[f"{name}.input_moment"], products, rtol=1e-3, atol=1e-5 * found.tokens)


def test_the_same_bytes_twice(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Model.open(tiny_checkpoint("deepseek_v3"))
    (first, one), (second, other) = (
        calibrate(checkpoint, TEXTS, batch_size=4, sequence_length=LENGTH, progress=lambda done, total: None) for _ in range(2)
    )
    assert first.model_dump_json() == second.model_dump_json()
    assert {name: array.tobytes() for name, array in one.items()} == {name: array.tobytes() for name, array in other.items()}


def test_progress_ends_with_all_tokens(tiny_checkpoint: Callable[[str], Path]) -> None:
    told: list[tuple[int, int]] = []
    calibrate(
        Model.open(tiny_checkpoint("switch_transformers")),
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
    roomy = run(Model.open(tiny_checkpoint("switch_transformers")))
    assert roomy.layers[0].dropped == 0
    assert layer.load == roomy.layers[0].load
    hidden, ids, gates = inputs(layer.geometry, 60)
    gates[ids == 0] = 0
    first = checkpoint.layers[0]
    assert measured(checkpoint, first, (hidden, ids, gates)).error["int4"][0] == 0


def test_what_the_calibration_says_of_itself(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Model.open(tiny_checkpoint("olmoe"))
    found = run(checkpoint, wanda_fraction=0.25)
    assert (found.model, found.model_type, found.dtype) == ("olmoe", "olmoe", "fp32")
    assert found.fingerprint == checkpoint.fingerprint
    assert (found.wanda_fraction, found.batch_size, found.sequence_length) == (0.25, 4, LENGTH)
    assert found.texts[0].sha256 != found.texts[1].sha256
    assert set(found.layers[0].error) == set(ROUNDED)
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
    assert found.statistics is not None
    statistics = load_file(tmp_path / found.statistics.name)
    assert len([name for name in statistics if ".experts." in name]) == 4
    assert "lm_head.input_moment" in statistics
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "c.json")]).output
    assert "2 layers of 8 experts, top-2" in shown
    assert "int4" in shown
