"""Perplexity, agreement, divergence and balance, compared with direct computations in float64 with torch."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.errors import UserError
from rq_compile.evaluation import bench as bench_module
from rq_compile.evaluation.balance import balance, logical_loads
from rq_compile.evaluation.bench import bench
from rq_compile.evaluation.divergence import Divergence
from rq_compile.evaluation.evaluate import evaluate
from rq_compile.evaluation.windows import MAX_BATCH, MAX_LOGITS, Windows, cut
from rq_compile.planning.schema import Plan, Slot
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.language_model import LanguageModel
from rq_compile.runtime.reference import Reference

# Divergence


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("positions", [1, 7])
def test_divergence_is_what_torch_says_in_float64(positions: int, scale: float) -> None:
    generator = np.random.default_rng(positions)
    reference, engine = (generator.standard_normal((positions, 50)).astype(np.float32) * scale for _ in range(2))
    targets = generator.integers(0, 50, positions)
    found = Divergence()
    found.add(reference, engine, targets)
    p, q = (torch.from_numpy(logits).double() for logits in (reference, engine))
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    np.testing.assert_allclose(found.kl, kl.item(), rtol=1e-10)
    for loss, logits in ((found.loss_reference, p), (found.loss_engine, q)):
        expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets), reduction="sum")
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-10)
    assert found.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def test_divergence_of_parts_is_that_of_the_whole() -> None:
    generator = np.random.default_rng(0)
    reference, engine = generator.standard_normal((2, 20, 9)).astype(np.float32)
    targets = generator.integers(0, 9, 20)
    whole, first, second = Divergence(), Divergence(), Divergence()
    whole.add(reference, engine, targets)
    first.add(reference[:13], engine[:13], targets[:13])
    second.add(reference[13:], engine[13:], targets[13:])
    first.merge(second)
    assert first.predictions == 20
    np.testing.assert_allclose(
        (first.kl, first.perplexity_engine, first.agreement), (whole.kl, whole.perplexity_engine, whole.agreement)
    )


def test_equal_logits_do_not_diverge() -> None:
    logits = np.random.default_rng(0).standard_normal((8, 11)).astype(np.float32)
    found = Divergence()
    found.add(logits, logits.copy(), np.zeros(8, np.int64))
    assert (found.kl, found.agreement) == (0.0, 1.0)
    assert found.perplexity_engine == found.perplexity_reference


# Windows


@given(count=st.integers(2, 300), length=st.integers(2, 70), vocabulary=st.sampled_from([100, 50_000, 2**26]))
def test_windows_hold_the_text_in_order_and_batches_stay_small(count: int, length: int, vocabulary: int) -> None:
    text = "".join(chr(33 + number % 90) for number in range(count))
    expected = tiny.tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids
    windows = cut("t", text, tiny.tokenizer().backend_tokenizer, length)
    assert windows.ids.shape == (max(1, count // length), min(count, length))
    assert windows.ids.ravel().tolist() == expected[: windows.ids.size]
    batches = list(windows.batches(vocabulary))
    np.testing.assert_array_equal(np.concatenate(batches), windows.ids)
    for batch in batches:
        assert len(batch) == 1 or (len(batch) <= MAX_BATCH and batch.size * vocabulary <= MAX_LOGITS)


def test_a_text_of_one_token_cannot_be_evaluated() -> None:
    with pytest.raises(UserError, match="t has 1 tokens, but an evaluation needs at least 2"):
        cut("t", "a", tiny.tokenizer().backend_tokenizer, 8)


# Balance


def plan_with(plan: Plan, slots: Sequence[tuple[int, int]], ranks: int = 1) -> Plan:
    """``plan`` with one layer of 8 experts, top-2, in the slots (expert, rank)."""
    made = [Slot(expert=expert, rank=rank, format="int8") for expert, rank in slots]
    return plan.model_copy(update={"ranks": ranks, "layers": [plan.layers[0].model_copy(update={"slots": made})]})


@pytest.fixture(scope="module")
def plan(stages: Path) -> Plan:
    return Engine.load(stages / "model.onnx").manifest.plan


def test_balance_by_hand(plan: Plan) -> None:
    """40 rows over 8 experts: 5 each would be perfect. Expert 0 has 20 in two slots, expert 1 has 12, expert 2 has 8."""
    made = plan_with(plan, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (7, 0), (0, 0)])
    rows = np.array([10, 12, 8, 0, 0, 0, 0, 0, 10])
    assert logical_loads(made.layers[0], rows).tolist() == [20, 12, 8, 0, 0, 0, 0, 0]
    (found,) = balance(made, {made.layers[0].name: rows})
    assert (found.lis_before, found.lis_after) == (20 / 5, 12 / 5)
    assert (found.strict_lis_before, found.strict_lis_after) == pytest.approx((20 / 5, 12 / (40 / 9)))
    assert found.rank_imbalance_before is None


def test_a_score_below_one_counts_as_one(plan: Plan) -> None:
    made = plan_with(plan, [(expert, 0) for expert in (*range(8), *range(8))])
    (found,) = balance(made, {made.layers[0].name: np.full(16, 3)})
    assert (found.lis_before, found.lis_after, found.strict_lis_after) == (1, 1, 1)


def test_ranks_by_hand(plan: Plan) -> None:
    """Consecutive blocks of four experts would put all 40 rows on one of two ranks; the plan halves them."""
    made = plan_with(plan, [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0), (5, 0), (6, 1), (7, 1)], ranks=2)
    (found,) = balance(made, {made.layers[0].name: np.array([10, 10, 10, 10, 0, 0, 0, 0])})
    assert (found.rank_imbalance_before, found.rank_imbalance_after) == (2, 1)


def test_a_layer_without_rows_is_an_error(plan: Plan) -> None:
    made = plan_with(plan, [(expert, 0) for expert in range(8)])
    with pytest.raises(ValueError, match="no row reached layer 0"):
        balance(made, {made.layers[0].name: np.zeros(8, np.int64)})


# The complete evaluation


def test_evaluation_is_a_direct_computation(stages: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Model.open(tiny_checkpoint("olmoe"))
    engine = Engine.load(stages / "model.onnx", threads=1)
    texts = {"a": "The quick brown fox jumps over the lazy dog. " * 3, "b": "0123456789 " * 9}
    windows = [cut(name, text, engine.tokenizer, 32) for name, text in texts.items()]
    seen: list[tuple[int, int]] = []
    found = evaluate(
        engine, Reference.load(checkpoint), windows, reference_name="r", progress=lambda *counts: seen.append(counts)
    )
    model = load_model(checkpoint)
    model.set_experts_implementation("eager")  # takes float64
    model.double()
    losses = []
    for text, window in zip(found.texts, windows, strict=True):
        ids = torch.from_numpy(window.ids)
        expected = model(ids, labels=ids).loss.item()
        losses += [expected] * (ids.numel() - len(ids))
        assert text.perplexity_reference == pytest.approx(np.exp(expected), rel=1e-4)
        assert text.perplexity_engine is not None
        ours, theirs = torch.from_numpy(engine.logits(window.ids)).double(), model(ids).logits
        kept = slice(None), slice(0, -1)
        np.testing.assert_allclose(
            np.log(text.perplexity_engine),
            torch.nn.functional.cross_entropy(ours[kept].reshape(-1, ours.shape[-1]), ids[:, 1:].reshape(-1)).item(),
            rtol=1e-5,
        )
        assert text.agreement == (ours[kept].argmax(-1) == theirs[kept].argmax(-1)).double().mean().item()
        assert (text.tokens, text.predictions) == (ids.numel(), ids.numel() - len(ids))
        assert text.layers == balance(engine.manifest.plan, engine.loads(window.ids))
    assert found.total.perplexity_reference == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert found.total.predictions == sum(text.predictions for text in found.texts)
    assert found.expert_bytes_before == 2 * 8 * (3 * 32 * 48) * 4
    total = sum(window.ids.size for window in windows)
    assert seen[-1] == (total, total)


def test_a_reference_with_another_vocabulary_is_refused(stages: Path) -> None:
    engine = Engine.load(stages / "model.onnx", threads=1)

    class Other:
        encoder_decoder, decoder_start = False, None

        def logits(self, ids: np.ndarray, *_: object, **__: Any) -> np.ndarray:
            return np.zeros((*ids.shape, 7), np.float32)

    with pytest.raises(UserError, match="vocabulary of 128, but the reference has one of 7"):
        evaluate(engine, cast(LanguageModel, Other()), [Windows("t", np.full((1, 4), 5))], reference_name="r")


def test_an_engine_that_hides_its_slots_has_everything_but_lis(stages: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Behaves like an engine of the lowering cuda, which cannot run here."""
    checkpoint = Model.open(tiny_checkpoint("olmoe"))
    counting = Engine.load(stages / "model.onnx", threads=1)
    hiding = Engine(counting.path, counting.manifest.model_copy(update={"slot_offsets": {}}), 1)
    windows = [cut("t", "The quick brown fox jumps over the lazy dog. " * 3, counting.tokenizer, 32)]
    reference = Reference.load(checkpoint)
    full, found = (evaluate(engine, reference, windows, reference_name="r") for engine in (counting, hiding))
    assert found.total.layers == []
    assert found.total == full.total.model_copy(update={"layers": []})


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_logit_that_is_no_number_leaves_perplexity_undefined(
    stages: Path, wrong: float, recwarn: pytest.WarningsRecorder
) -> None:
    engine = Engine.load(stages / "model.onnx", threads=1)

    class Broken:
        encoder_decoder, decoder_start = False, None

        def logits(self, ids: np.ndarray, *_: object, **__: Any) -> np.ndarray:
            return np.full((*ids.shape, engine.manifest.vocabulary), wrong, np.float32)

    found = evaluate(engine, cast(LanguageModel, Broken()), [Windows("t", np.full((1, 4), 5))], reference_name="r").total
    assert (found.perplexity_reference, found.kl, found.perplexity_change) == (None, None, None)
    assert found.perplexity_engine is not None
    assert not recwarn.list


# Speed


class Clockwork:
    """A model that takes ``prefill`` seconds for the first token and ``decode`` for each other; the first round takes longer."""

    encoder_decoder, decoder_start = False, None

    def __init__(self, clock: list[float], prefill: float, decode: float, order: list[str], name: str) -> None:
        self.clock, self.times, self.order, self.name = clock, (prefill, decode), order, name

    def generate(self, prompt: Sequence[int], max_tokens: int, *, stop: bool = True) -> Iterator[int]:
        assert not stop
        self.order.append(self.name)
        slow = 10.0 if self.order.count(self.name) == 1 else 1.0
        for number in range(max_tokens):
            self.clock[0] += slow * self.times[number > 0]
            yield 1


def test_bench_alternates_warms_up_and_takes_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    order: list[str] = []
    monkeypatch.setattr(bench_module, "perf_counter", lambda: clock[0])
    ours = cast(LanguageModel, Clockwork(clock, 0.5, 0.1, order, "e"))
    theirs = cast(LanguageModel, Clockwork(clock, 1.0, 0.4, order, "o"))
    found = bench(ours, theirs, names=("e", "o"), vocabulary=9, prompt_tokens=16, new_tokens=4, rounds=3)
    assert order == ["e", "o"] * 4
    assert found.other is not None
    np.testing.assert_allclose([found.engine.prefill, found.engine.decode], [32, 10])
    np.testing.assert_allclose([found.other.prefill, found.other.decode], [16, 2.5])
    assert (found.ratio_prefill, found.ratio_decode) == pytest.approx((2, 4))
    alone = bench(ours, None, names=("e", ""), vocabulary=9, prompt_tokens=16, new_tokens=4, rounds=1)
    assert alone.other is alone.ratio_prefill is alone.ratio_decode is None
