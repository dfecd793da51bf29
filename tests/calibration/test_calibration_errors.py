"""What a calibration rejects, and the error messages."""

import errno
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from calibrated import LENGTH, SWIGLU, TEXTS, copied, run, with_tensor
from torch import nn

from rq_compile import spill
from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.calibration import recording
from rq_compile.calibration.recording import LayerRecording
from rq_compile.calibration.routing import Routing
from rq_compile.calibration.text import batches, tokenize
from rq_compile.errors import UserError


def refused(checkpoint: Model, match: str, texts: dict[str, str] = TEXTS) -> None:
    with pytest.raises(UserError, match=match):
        run(checkpoint, texts)


def test_refuses_texts_that_are_none(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Model.open(tiny_checkpoint("olmoe"))
    refused(checkpoint, "there is no text to calibrate on", {})
    refused(checkpoint, r"empty\.txt has 0 tokens, but a calibration needs at least 2; give a longer", {"empty.txt": ""})
    refused(checkpoint, r"short\.txt has 1 tokens", {**TEXTS, "short.txt": "a"})


def test_two_tokens_are_enough(tiny_checkpoint: Callable[[str], Path]) -> None:
    for family in ("gpt_oss", "switch_transformers"):
        found = run(Model.open(tiny_checkpoint(family)), {"two.txt": "ab"})
        for layer in found.layers:
            assert layer.estimated == list(range(layer.geometry.experts))
            assert all(0 < error < math.inf for error in layer.error["int8"])


def test_refuses_a_checkpoint_without_tokenizer(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied(tiny_checkpoint("olmoe"), tmp_path / "model")
    (checkpoint.path / "tokenizer.json").write_text("{}")
    refused(checkpoint, r"tokenizer\.json cannot be read: .*; put one in its place")
    (checkpoint.path / "tokenizer.json").unlink()
    refused(checkpoint, r"has no tokenizer\.json; copy the model's")


def test_refuses_another_model_s_tokenizer(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied(tiny_checkpoint("olmoe"), tmp_path / "model")
    tokenizer = json.loads((checkpoint.path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["~"] = 198
    (checkpoint.path / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(checkpoint, r"gives the token 198, but the model has 128 tokens \(0-127\)", {"a.txt": "~~"})


def test_a_tokenizer_that_truncates_does_not(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied(tiny_checkpoint("olmoe"), tmp_path / "model")
    tokenizer = tiny.tokenizer().backend_tokenizer
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(checkpoint.path / "tokenizer.json"))
    assert [len(ids) for ids in tokenize(checkpoint, TEXTS).of] == [len(text) for text in TEXTS.values()]


def test_refuses_sequences_that_the_model_cannot_read(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied(tiny_checkpoint("olmoe"), tmp_path / "model", max_position_embeddings=LENGTH - 1)
    refused(checkpoint, "--sequence-length 12 is more than the model's 11 positions; choose a smaller one")


def test_names_the_first_layer_that_is_not_finite(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    checkpoint = with_tensor(tiny_checkpoint("olmoe"), tmp_path / "model", name, lambda old: old * np.float32(2e38))
    refused(
        checkpoint, r"the input of model\.layers\.1\.mlp\.experts is not finite on first\.txt; check the checkpoint's weights"
    )


def test_names_the_expert_whose_weight_is_not_finite(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Model.open(tiny_checkpoint("olmoe"))
    texts = {"two.txt": "ab"}
    unreached = run(checkpoint, texts).layers[1].load.index(0)
    name = f"model.layers.1.mlp.experts.{unreached}.up_proj.weight"
    checkpoint = with_tensor(checkpoint.path, tmp_path / "model", name, lambda old: old * np.float32(np.inf))
    refused(checkpoint, rf"{name} in .* has a weight that is not finite; repair", texts)


def test_refuses_a_layer_that_gives_nothing(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint("granitemoe"), tmp_path / "model")
    name = "model.layers.1.block_sparse_moe.output_linear.weight"
    checkpoint = with_tensor(tiny_checkpoint("granitemoe"), tmp_path / "zero", name, np.zeros_like)
    refused(
        checkpoint,
        r"the squared norm of the output of model\.layers\.1\.block_sparse_moe\.experts on .* is 0, so errors cannot be measured",
    )


def test_refuses_a_layer_that_was_bypassed(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    watch = recording.watch

    def watch_others(model: nn.Module, layer: MoeLayer, receive: Callable[[Routing], None]) -> None:
        if layer.index != 1:
            watch(model, layer, receive)

    monkeypatch.setattr(recording, "watch", watch_others)
    refused(
        Model.open(tiny_checkpoint("mixtral")),
        r"model\.layers\.1\.mlp\.experts routed 0 \(token, choice\) pairs of a batch of first\.txt, but 48 tokens x top-k 2",
    )


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (np.full((4, 2), 6), "routed 0 .* 3 tokens x top-k 2 = 6 were expected"),
        (np.full((4, 1), 5), "routed 3 .* 3 tokens x top-k 2 = 6 were expected"),
        (np.full((5, 2), 5), "was given 5 tokens of a batch of 4, so that padding cannot be recognised"),
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

    monkeypatch.setattr(spill.tempfile, "TemporaryFile", lambda prefix, dir: Full())
    refused(
        Model.open(tiny_checkpoint("phimoe")),
        rf"cannot keep the inputs of model\.layers\.0\.mlp\.experts in {tempfile.gettempdir()}: No space left on device; free",
    )
