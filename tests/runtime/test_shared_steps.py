"""Sequences that share the steps of an engine get the answers of each alone.

test_families.py and test_model_types.py test this with other families: latent attention, windows, recurrent states.
"""

from collections.abc import Callable
from pathlib import Path

import alone_and_together
import numpy as np
import plans
import pytest
import tiny

from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.errors import UserError
from rq_compile.planning.schema import Slot
from rq_compile.runtime import engine as engine_module
from rq_compile.runtime.engine import Engine
from rq_compile.standalone.decoding import shape_of
from rq_compile.standalone.sampling import SamplingParams
from rq_compile.standalone.step_model import EngineSteps
from rq_compile.targets.onnxruntime import compile_engine


@pytest.fixture(scope="module")
def compiled(
    tiny_checkpoint: Callable[[str], Path], export_once: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Engine]:
    """``compiled(slots)``: an engine of the tiny OLMoE with these slots."""
    root, checkpoint = tmp_path_factory.mktemp("shared"), Model.open(tiny_checkpoint("olmoe"))

    def engine(slots: Callable = plans.replicated_and_quantized) -> Engine:
        path = root / f"{slots.__name__}.onnx"
        if not path.exists():
            compile_engine(checkpoint, plans.plan_of(checkpoint, slots), path, exported=export_once(checkpoint))
        return Engine.load(path, threads=1)

    return engine


def test_answers_are_those_alone(compiled: Callable[..., Engine]) -> None:
    alone_and_together.check(compiled(plans.replicated_and_quantized))


def mixed(layer: MoeLayer) -> list[Slot]:
    return [Slot(expert=expert, format=format) for expert in range(layer.geometry.experts) for format in ("int4", "fp32")]


def test_copies_of_different_formats_do_not_share_steps(compiled: Callable[..., Engine]) -> None:
    """Which copy a token gets depends on the others in its step."""
    engine = compiled(mixed)
    alone_and_together.check(engine, piece=128, tolerance=0)


def test_arrays_in_any_layout_of_memory(compiled: Callable[..., Engine]) -> None:
    """They are bound by their addresses, so a view must not be taken for an array of its own."""
    engine = compiled()
    steps, ids = EngineSteps(engine._session, engine.manifest.model_dump()), plans.tokens(1, 6)

    def logits(view: Callable[[np.ndarray], np.ndarray], present: Callable[[np.ndarray], np.ndarray] = np.asarray) -> np.ndarray:
        past = [np.zeros(shape_of(tensor, 1, 0), np.float32) for tensor in steps.cache]
        after = [present(np.zeros(shape_of(tensor, 1, 6), np.float32)) for tensor in steps.cache]
        return steps.step(view(ids), view(np.ones((1, 6), np.int64)), view(np.arange(6)[None]), past, after)

    def view(array: np.ndarray) -> np.ndarray:
        return np.repeat(array, 2, axis=1)[:, ::2]

    assert not view(ids).flags.c_contiguous
    np.testing.assert_array_equal(logits(view), logits(np.asarray))
    with pytest.raises(ValueError, match="is not contiguous"):
        logits(np.asarray, view)


@pytest.mark.parametrize("count", [2, 5])
def test_sequences_of_one_length_have_the_bits_of_each_alone(compiled: Callable[..., Engine], count: int) -> None:
    engine = compiled()
    prompts = [plans.tokens(9, seed=seed).tolist() for seed in range(count)]
    one = lambda prompt: alone_and_together.answered(engine.scheduler(slots=1, max_length=64), [prompt], [8])[0]  # noqa: E731
    alone = [one(prompt) for prompt in prompts]
    scheduler, params = engine.scheduler(slots=count, max_length=64), alone_and_together.params(8)
    answers = [scheduler.submit(prompt, params) for prompt in prompts]
    while scheduler.busy:
        scheduler.step()
    for own, answer in zip(alone, answers, strict=True):
        shared = list(answer)
        assert [choice.token for choice in shared] == [choice.token for choice in own]
        np.testing.assert_array_equal(alone_and_together.logprobs(shared), alone_and_together.logprobs(own))


def test_a_seed_gives_the_same_answer_whoever_shares_the_steps(compiled: Callable[..., Engine]) -> None:
    engine = compiled()
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True)
    results = []
    for others in (0, 3):
        scheduler = engine.scheduler(slots=4, max_length=64)
        for number in range(others):
            scheduler.submit(plans.tokens(5, seed=number).tolist(), SamplingParams(max_tokens=9 + number))
        answer = scheduler.submit(plans.tokens(5).tolist(), params)
        while scheduler.busy:
            scheduler.step()
        results.append([choice.token for choice in answer])
    assert results[0] == results[1]
    assert len(results[0]) == 20


def test_a_cache_that_does_not_fit_is_one_sentence(compiled: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "free_memory", lambda: 2**15)
    with pytest.raises(UserError, match=r"no memory for the caches of 8 sequences of .*; use fewer slots, or free some memory"):
        compiled().scheduler()
    monkeypatch.setattr(engine_module, "free_memory", lambda: 2**21)
    assert 64 < compiled().scheduler().max_length <= tiny.COMMON["max_position_embeddings"]
