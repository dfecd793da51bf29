"""Whether sequences that share their steps get the answers that each gets alone."""

from functools import partial

import numpy as np
import plans

from rq_compile.runtime.engine import Engine
from rq_compile.standalone.answer import Answer
from rq_compile.standalone.sampling import Choice, SamplingParams
from rq_compile.standalone.scheduler import Scheduler
from rq_compile.standalone.step_model import reuses_prefixes

# Longer and shorter than the windows and groups of the tiny models.
LENGTHS = (3, 20, 9, 1, 14)
TOKENS = 12


def check(engine: Engine, piece: int = 6, tolerance: float = 1e-4, in_place_tolerance: float = 0) -> None:
    """Five sequences join two steps after each other, and two of them leave early. Log probabilities are the same bit for bit, or
    up to ``in_place_tolerance``, if every tensor of the cache grows in place. Otherwise they may differ by rounding, up to
    ``tolerance``: attention then sums over masked columns, too, in another grouping."""
    if all(tensor.in_place for tensor in engine.manifest.cache):
        tolerance = in_place_tolerance
    prompts = [plans.tokens(length, seed=length).tolist() for length in LENGTHS]
    counts = [TOKENS - 5 * (number % 2) for number in range(len(prompts))]
    together = answered(engine.scheduler(slots=4, max_length=64, prompt_piece=piece), prompts, counts)
    for prompt, most, shared in zip(prompts, counts, together, strict=True):
        (own,) = answered(engine.scheduler(slots=1, max_length=64, prompt_piece=piece), [prompt], [most])
        tokens = [choice.token for choice in own]
        assert tokens == list(engine.generate(prompt, most, stop=False))
        assert [choice.token for choice in shared] == tokens
        np.testing.assert_allclose(logprobs(shared), logprobs(own), atol=tolerance, rtol=0)
    check_next_turn(engine, max(tolerance, 1e-4))


def check_next_turn(engine: Engine, tolerance: float = 1e-4) -> None:
    """A conversation whose cache is kept gets the answers of one that is read from its beginning, also where it goes on otherwise
    than before."""
    cache, ask = engine.prefix_cache(), partial(engine.choices, max_tokens=TOKENS, stop=False, sampling=params(TOKENS))
    first = plans.tokens(9).tolist()
    said = [choice.token for choice in ask(first, prefix_cache=cache)]
    following = [*first, *said, *plans.tokens(5, seed=1).tolist()]
    changed = [*following[:12], *plans.tokens(7, seed=2).tolist()]
    known = [cache.longest(prompt)[0] for prompt in (following, changed)]
    manifest = engine.manifest.model_dump()
    states = any("past" not in tensor["shape"] for tensor in manifest["cache"])
    assert known == ([20, 0 if states else 12] if reuses_prefixes(manifest) else [0, 0])
    for prompt in (following, changed):
        kept, read = (list(ask(prompt, prefix_cache=given)) for given in (cache, None))
        assert [choice.token for choice in kept] == [choice.token for choice in read]
        np.testing.assert_allclose(logprobs(kept), logprobs(read), atol=tolerance, rtol=0)


def answered(scheduler: Scheduler, prompts: list[list[int]], counts: list[int]) -> list[list[Choice]]:
    answers: list[Answer] = []
    for prompt, most in zip(prompts, counts, strict=True):
        answers.append(scheduler.submit(prompt, params(most)))
        scheduler.step()
        scheduler.step()
    while scheduler.busy:
        scheduler.step()
    return [list(answer) for answer in answers]


def params(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=5)


def logprobs(choices: list[Choice]) -> np.ndarray:
    """``[tokens, 5]``, descending."""
    return np.array([[value for _, value in choice.top] for choice in choices])
