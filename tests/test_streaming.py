"""A model run layer by layer: the same calibration as of the whole model, in less memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from calibrated import LENGTH, TEXTS, copied, letters

from rq_compile.calibration import calibrate as calibrate_module
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.memory import Way
from rq_compile.calibration.schema import Calibration
from rq_compile.checkpoint.checkpoint import Checkpoint

Calibrated = tuple[Calibration, dict[str, np.ndarray]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calibrated]:
    """``run(checkpoint, whole, states_in_memory)`` calibrates that way, whatever memory there is."""

    def run(
        checkpoint: Checkpoint, whole: bool, in_memory: bool = True, texts: dict[str, str] = TEXTS, **more: Any
    ) -> Calibrated:
        monkeypatch.setattr(calibrate_module, "choose_way", lambda *_, **__: Way(whole, in_memory, "as asked for"))
        options: dict[str, Any] = {"batch_size": 4, "sequence_length": LENGTH, "progress": lambda done, total: None}
        return calibrate(checkpoint, texts, **{**options, **more})

    return run


def same(one: Calibrated, other: Calibrated) -> None:
    assert one[0].model_copy(update={"layers": []}) == other[0].model_copy(update={"layers": []})
    for whole, streamed in zip(one[0].layers, other[0].layers, strict=True):
        for field in ("name", "geometry", "load", "text_loads", "batch_loads", "dropped", "estimated"):
            assert getattr(whole, field) == getattr(streamed, field), field
        np.testing.assert_allclose(streamed.wanda, whole.wanda, rtol=1e-4)
        for format, error in whole.error.items():
            np.testing.assert_allclose(streamed.error[format], error, rtol=1e-3, atol=1e-13, err_msg=format)
    assert one[1].keys() == other[1].keys()
    for name, moment in one[1].items():
        np.testing.assert_allclose(other[1][name], moment, rtol=1e-3, atol=1e-5 * np.abs(moment).max())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gives_what_the_whole_model_gives(
    tiny_checkpoint: Callable[[str], Path], run: Callable[..., Calibrated], family: str
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    whole = run(checkpoint, True)
    same(whole, run(checkpoint, False, True))
