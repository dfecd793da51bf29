"""The sensitivity of a layer, compared with transformers, and that it does not depend on a few tokens with very large states."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import LENGTH, TEXTS, routers_choices, run
from torch import nn

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.calibration.dense import Stream, stream_of
from rq_compile.calibration.text import batches


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2", "gpt_oss"])
def test_sensitivity_is_that_of_the_states_in_transformers(tiny_checkpoint: Callable[[str], Path], family: str) -> None:
    checkpoint, text = Model.open(tiny_checkpoint(family)), TEXTS["second.txt"]
    found = run(checkpoint, {"a": text})
    model = load_model(checkpoint)
    outputs: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in checkpoint.layers}
    states: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in checkpoint.layers}

    def squares(into: list[torch.Tensor]) -> Callable[..., None]:
        def seen(module: nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            rows = output[0] if isinstance(output, tuple) else output
            into.append(rows.double().square().sum(-1).ravel())

        return seen

    for name in outputs:
        model.get_submodule(name).register_forward_hook(squares(outputs[name]))
        model.get_submodule(".".join(name.split(".")[:3])).register_forward_hook(squares(states[name]))
    routers_choices(checkpoint, text, model)
    for layer in found.layers:
        output, inverse = torch.cat(outputs[layer.name]).mean(), torch.cat(states[layer.name]).reciprocal().mean()
        assert layer.sensitivity == pytest.approx(float(output * inverse), rel=1e-3), layer.index


def test_a_token_with_large_states_does_not_hide_the_others() -> None:
    text: dict[str, Any] = {"batch_size": 1, "sequence_length": LENGTH}
    (batch,) = batches([np.arange(LENGTH)], measured_tokens=LENGTH, **text)
    states = torch.ones(1, LENGTH, 4)
    plain = stream_of([(batch, states)])
    assert plain == Stream(4.0 * LENGTH, LENGTH / 4)
    states[0, 0] *= 1e4
    sink = stream_of([(batch, states)])
    assert sink.square > 1e6 * plain.square
    assert sink.inverse == pytest.approx(plain.inverse * (1 - 1 / LENGTH), rel=1e-6)
    states[0, 0] = 0.0
    assert stream_of([(batch, states)]).inverse == pytest.approx(plain.inverse * (1 - 1 / LENGTH))
