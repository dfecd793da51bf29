"""What a rounded head changes of the next token's probabilities, compared with torch's KL divergence of the whole vocabulary."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rq_compile.calibration import head
from rq_compile.calibration.head import head_divergence
from rq_compile.quantization.formats import DENSE_QUANTIZED, Format
from rq_compile.quantization.quantizer import stored

VOCABULARY, HIDDEN = 23, 8


def matrix() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)


def rounded(weights: np.ndarray, format: Format) -> np.ndarray:
    return stored(weights, format)


def whole(weights: np.ndarray, hidden: torch.Tensor, format: Format, final: Any) -> float:
    before, after = (final(hidden.double() @ torch.from_numpy(each).double().mT) for each in (weights, rounded(weights, format)))
    return float(F.kl_div(after.log_softmax(1), before.log_softmax(1), reduction="sum", log_target=True))


@pytest.mark.parametrize("rows", [1, 7, 1 << 13], ids=["entry by entry", "in parts", "at once"])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["", "one entry is nearly certain"])
def test_the_parts_of_a_vocabulary_add_up(monkeypatch: pytest.MonkeyPatch, rows: int, tokens: int, scale: float) -> None:
    monkeypatch.setattr(head, "ROWS", rows)
    weights, hidden = matrix(), scale * torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))
    found, count = head_divergence(SimpleNamespace(), weights, hidden, rounded)
    assert count == tokens
    for format in DENSE_QUANTIZED:
        assert found[format] == pytest.approx(whole(weights, hidden, format, lambda logits: logits), rel=1e-4, abs=1e-6)


def test_logits_are_those_of_the_model() -> None:
    """Some families bound them."""
    weights, hidden = matrix(), torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    found, _ = head_divergence(SimpleNamespace(final_logit_softcapping=2.0), weights, hidden, rounded)
    for format in DENSE_QUANTIZED:
        assert found[format] == pytest.approx(whole(weights, hidden, format, lambda logits: 2 * torch.tanh(logits / 2)), rel=1e-4)


def test_no_token_and_no_change_have_no_divergence() -> None:
    none = dict.fromkeys(DENSE_QUANTIZED, 0.0)
    assert head_divergence(SimpleNamespace(), matrix(), torch.zeros(0, HIDDEN), rounded) == (none, 0)
    found, _ = head_divergence(SimpleNamespace(), matrix(), torch.randn(5, HIDDEN), lambda some, _: some)
    assert found == pytest.approx(none, abs=1e-9)
