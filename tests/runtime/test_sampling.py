"""Tokens are chosen with the probabilities of transformers' logits processors, and as vLLM's parameters say."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import SequenceBiasLogitsProcessor

from rq_compile.standalone.sampling import GREEDY, HEAD, Choice, Sampler, SamplingError, SamplingParams, distribution

pytestmark = pytest.mark.quick


def logits_of(seed: int, size: int = 300) -> np.ndarray:
    """Different values, as of a model."""
    random = np.random.default_rng(seed)
    return (random.permutation(size) * 0.01 + random.normal(0, 3, size)).astype(np.float32)


def of_transformers(logits: np.ndarray, params: SamplingParams, prompt: list[int]) -> np.ndarray:
    """Probabilities by transformers, in the order of vLLM: ``min_p`` comes before ``top_p``."""
    steps = LogitsProcessorList()
    if params.logit_bias:
        steps.append(SequenceBiasLogitsProcessor([[[token], float(bias)] for token, bias in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    steps.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.min_p > 0:
        steps.append(MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    scores = torch.from_numpy(logits).double()[None]
    return steps(torch.LongTensor([prompt]), scores).softmax(-1)[0].numpy()


def ours(logits: np.ndarray, params: SamplingParams, prompt: list[int]) -> np.ndarray:
    ids, kept = distribution(Sampler(params, prompt)._adjusted(logits), params)
    probabilities = np.zeros(len(logits))
    probabilities[ids] = kept
    return probabilities


def agree(logits: np.ndarray, params: SamplingParams, prompt: list[int]) -> None:
    np.testing.assert_allclose(ours(logits, params, prompt), of_transformers(logits, params, prompt), atol=1e-5, rtol=1e-4)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k of more than there are": {"top_k": 5000},
    "top_k of all": {"top_k": -1},
    "top_p": {"top_p": 0.9},
    "a small top_p": {"top_p": 1e-6},
    "a large top_p": {"top_p": 0.9999},
    "min_p": {"min_p": 0.05},
    "min_p of one": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.3},
    "repetition wanted": {"repetition_penalty": 0.7},
    "bias": {"logit_bias": {3: 4.5, "5": -100}},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.1, "logit_bias": {9: 3}},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("size", [50, 4 * HEAD, 40 * HEAD])
def test_probabilities_are_those_of_transformers(name: str, size: int) -> None:
    for seed in range(5):
        agree(logits_of(seed, size), SamplingParams(**SETTINGS[name]), [1, 5, 5, 9])


# The borders of top_p lie between two sums of probabilities, which float32 and float64 may round to different sides.
@settings(max_examples=200)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 40),
    temperature=st.sampled_from([0.1, 0.5, 1.0, 1.7, 10.0]),
    top_k=st.integers(-1, 50),
    top_p=st.sampled_from([0.05, 0.31, 0.5, 0.777, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.6]),
    penalty=st.sampled_from([0.5, 1.0, 1.2, 3.0]),
    data=st.data(),
)
def test_any_parameters_agree_with_transformers(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, data: st.DataObject
) -> None:
    tokens = st.integers(0, size - 1)
    prompt = data.draw(st.lists(tokens, min_size=1, max_size=8))
    biases = data.draw(st.dictionaries(tokens, st.sampled_from([-100.0, -3.0, 0.25, 5.0]), max_size=3))
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty, logit_bias=biases)
    agree(logits_of(seed, size), params, prompt)


def test_tokens_as_likely_as_the_last_within_top_k_are_kept() -> None:
    logits = np.array([1, 3, 2, 2, 0], np.float32)
    ids, _ = distribution(logits, SamplingParams(top_k=2))
    assert ids.tolist() == [1, 2, 3]
    assert np.flatnonzero(of_transformers(logits, SamplingParams(top_k=2), [0])).tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_have_the_probabilities(name: str) -> None:
    """Of 4000 draws, the share of each token is within five standard deviations of its probability."""
    params, logits, draws = SamplingParams(**SETTINGS[name], seed=3), logits_of(1, 30) / 3, 4000
    sampler = Sampler(params, [1, 5])
    if params.penalized:  # otherwise, the answer would change the probabilities
        sampler.choose(logits)
        counts: Counter[int] = Counter()
        for _ in range(draws):
            sampler._counts[:] = 0
            counts[sampler.choose(logits).token] += 1
    else:
        counts = Counter(sampler.choose(logits).token for _ in range(draws))
    probabilities = ours(logits, params, [1, 5])
    for token, probability in enumerate(probabilities):
        deviation = math.sqrt(probability * (1 - probability) * draws)
        assert abs(counts[token] - probability * draws) <= 5 * deviation + (probability > 0), token


def drawn(params: SamplingParams, count: int = 40) -> list[int]:
    sampler = Sampler(params, [1, 2])
    return [sampler.choose(logits_of(step)).token for step in range(count)]


def test_a_seed_decides_whoever_else_is_served() -> None:
    alone = drawn(SamplingParams(seed=7))
    assert alone == drawn(SamplingParams(seed=7)) != drawn(SamplingParams(seed=8))
    many = {seed: Sampler(SamplingParams(seed=seed), [1, 2]) for seed in (7, 7_000, -7, None)}
    together: dict[int | None, list[int]] = {seed: [] for seed in many}
    for step in range(40):
        for seed, sampler in many.items():
            together[seed].append(sampler.choose(logits_of(step)).token)
    assert together[7] == alone
    assert len({tuple(tokens) for tokens in together.values()}) == len(many)
    assert drawn(SamplingParams()) != drawn(SamplingParams())


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1e-6, top_k=3), SamplingParams(top_k=1)])
def test_greedy(params: SamplingParams) -> None:
    for seed in range(20):
        logits = logits_of(seed)
        assert Sampler(params).choose(logits) == Choice(int(logits.argmax()), None, ())


def test_penalties_count_the_answer() -> None:
    """As OpenAI's documentation gives the formula: mu - c * frequency - (c > 0) * presence."""
    params = SamplingParams(temperature=0, frequency_penalty=0.5, presence_penalty=0.25)
    logits = np.array([1.0, 1.6, 0.2], np.float32)
    sampler = Sampler(params, [1, 1])  # the prompt does not count
    counts, wanted = np.zeros(3), []
    for _ in range(30):
        token = int((logits - 0.5 * counts - 0.25 * (counts > 0)).argmax())
        counts[token] += 1
        wanted.append(token)
    sampler = Sampler(params, [1, 1])
    assert [sampler.choose(logits).token for _ in range(30)] == wanted
    assert len(set(wanted)) == 3


def test_a_repetition_penalty_counts_the_answer_too() -> None:
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), [0])
    logits = np.array([3.0, 2.5, 2.0, -1.0], np.float32)
    assert [sampler.choose(logits).token for _ in range(4)] == [1, 2, 0, 0]
    assert logits.tolist() == [3.0, 2.5, 2.0, -1.0]


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_log_probabilities_are_those_of_the_model(count: int) -> None:
    """Before temperature and penalties, and of the chosen token even if it is not among the best."""
    logits = logits_of(4, 50)
    exact = torch.from_numpy(logits).double().log_softmax(-1)
    params = SamplingParams(temperature=3.0, repetition_penalty=1.5, logprobs=count, seed=0)
    sampler = Sampler(params, [1, 2, 3])
    for _ in range(10):
        choice = sampler.choose(logits)
        assert choice.logprob == pytest.approx(float(exact[choice.token]), abs=1e-9)
        values, ids = exact.topk(count)
        assert [token for token, _ in choice.top] == ids.tolist()
        assert [value for _, value in choice.top] == pytest.approx(values.tolist(), abs=1e-9)


def test_more_log_probabilities_than_tokens() -> None:
    assert [token for token, _ in Sampler(SamplingParams(logprobs=20)).choose(np.array([0, 2, 1], np.float32)).top] == [1, 2, 0]


def test_ends() -> None:
    assert SamplingParams(stop_token_ids=(5,)).ends([1, 2]) == {1, 2, 5}
    assert SamplingParams(stop_token_ids=(5,), ignore_eos=True).ends([1, 2]) == {5}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=2, logprobs=1)])
def test_logits_that_are_not_finite(value: float, params: SamplingParams) -> None:
    logits = logits_of(0)
    logits[17] = value
    with pytest.raises(ArithmeticError, match="token 17"):
        Sampler(params).choose(logits)
    logits[17] = -math.inf  # a token that the model excludes
    assert Sampler(params).choose(logits).token != 17


WRONG: list[tuple[str, Any]] = [
    *(("temperature", value) for value in (-0.1, math.nan, math.inf, "hot", None, True, [1])),
    *(("top_k", value) for value in (-2, 1.5, "3", True, 2**40)),
    *(("top_p", value) for value in (0, -0.5, 1.01, "0.9", math.nan)),
    *(("min_p", value) for value in (-0.1, 1.1)),
    *(("repetition_penalty", value) for value in (0, -1, math.inf)),
    *(("presence_penalty", value) for value in (-2.5, 3)),
    *(("frequency_penalty", value) for value in (-2.5, "much")),
    *(("seed", value) for value in (2**64, 1.0, "x", True)),
    *(("stop", value) for value in ("", ["a", ""], [3], 3, {"a": 1})),
    *(("stop_token_ids", value) for value in ([-1], ["3"], 3, [True])),
    *(("logit_bias", value) for value in ({"x": 1}, {3: 101}, {3: "much"}, {-1: 2}, [3], {3: math.nan}, None)),
    *(("logprobs", value) for value in (-1, 21, True, 2.0)),
    *(("max_tokens", value) for value in (0, -3, 1.5, "9")),
    *(("ignore_eos", value) for value in (1, "yes", None)),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_are_named_in_one_sentence(name: str, value: Any) -> None:
    with pytest.raises(SamplingError) as refusal:
        SamplingParams(**{name: value})
    sentence = str(refusal.value)
    assert sentence.startswith(name)
    assert "; give " in sentence
    assert "\n" not in sentence


def test_tokens_outside_the_vocabulary() -> None:
    SamplingParams(logit_bias={9: 1}, stop_token_ids=(9,)).check_tokens(10)
    for params in (SamplingParams(logit_bias={10: 1}), SamplingParams(stop_token_ids=(10,))):
        with pytest.raises(SamplingError, match="names the token 10; give tokens of 0 to 9"):
            params.check_tokens(10)


def test_numbers_of_numpy_and_of_json_are_taken() -> None:
    numpy: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.int64(3)}
    of_json: dict[str, Any] = {"logit_bias": {"7": 1}, "stop": "x", "stop_token_ids": [2]}
    expected = SamplingParams(temperature=0.5, top_k=3, logit_bias={7: 1}, stop=("x",), stop_token_ids=(2,))
    assert SamplingParams(**numpy, **of_json) == expected
