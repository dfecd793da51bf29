"""An engine of the lowering cuda in ONNX Runtime, its launches computed by Triton's interpreter: test_cuda_engine.py runs this.

RQ_ENGINE is that engine, RQ_MODEL its checkpoint, RQ_NATIVE logits of an engine of the same plan for the CPU; see
interpreted_cuda_ops.py for the rest.
"""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from interpreted_launches import Launches

from rq_compile.architectures.model import Model
from rq_compile.engine import library
from rq_compile.evaluation.evaluate import evaluate
from rq_compile.evaluation.windows import Windows
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.files import read_manifest
from rq_compile.runtime.reference import Reference

HOST = ctypes.CDLL(os.environ["RQ_HOST"])
ENGINE = Path(os.environ["RQ_ENGINE"])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """On the CPU provider, with the library that adds the ops to it."""
    HOST.on_stream(True)
    monkeypatch.setattr(library, "library_path", lambda name: os.environ["RQ_HOST"])
    yield Engine(ENGINE, read_manifest(ENGINE).model_copy(update={"provider": "CPUExecutionProvider"}), 1)
    HOST.on_stream(False)


def test_it_says_what_the_native_engine_says(engine: Engine) -> None:
    launches = Launches()
    ids = np.random.default_rng(0).integers(4, 99, (2, 9))
    logits = engine.logits(ids)
    assert launches.failure is None
    assert [name for name, *_ in launches.seen].count("combine_fp16") == len(engine.manifest.plan.layers)
    wanted = np.load(os.environ["RQ_NATIVE"])
    # A token whose experts' scores differ only by rounding may go to a different expert.
    assert np.quantile(np.abs(logits - wanted).max(-1), 0.9) < 0.01 * np.abs(wanted).max()


def test_generating_with_the_cache_is_recomputing_everything(engine: Engine) -> None:
    launches = Launches()
    ids = [5, 9, 77]
    generated = list(engine.generate(ids, 3, stop=False))
    assert launches.failure is None
    assert engine.logits(np.array([ids + generated[:2]]))[0, -1].argmax() == generated[2]


def test_it_is_evaluated(engine: Engine) -> None:
    launches = Launches()
    windows = Windows("t", np.random.default_rng(1).integers(4, 99, (1, 8)))
    reference = Reference.load(Model.open(Path(os.environ["RQ_MODEL"])), threads=1)
    found = evaluate(engine, reference, [windows], reference_name="r").total
    assert launches.failure is None
    assert found.layers == []
    assert found.predictions == 7
    assert found.perplexity_reference is not None
    assert found.kl is not None
    assert found.perplexity_engine == pytest.approx(found.perplexity_reference, rel=0.2)
    assert 0 < found.kl < 0.6  # one expert is constant, and two are in 2 bits
