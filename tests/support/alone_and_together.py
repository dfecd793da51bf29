"""Whether sequences that share their steps get the answers that each gets alone."""

import numpy as np
import plans

from rq_compile.runtime.engine import Engine
from rq_compile.standalone.sampling import Choice, SamplingParams
from rq_compile.standalone.scheduler import Answer, Scheduler

# Longer and shorter than the windows and groups of the tiny models.
LENGTHS = (3, 20, 9, 1, 14)
TOKENS = 12


def check(engine: Engine, piece: int = 6, tolerance: float = 1e-4) -> None:
    """Five sequences join two steps after each other, and two of them leave early. Log probabilities may differ by rounding:
    attention sums over masked columns, too, in another grouping."""
    prompts = [plans.tokens(length, seed=length).tolist() for length in LENGTHS]
    counts = [TOKENS - 5 * (number % 2) for number in range(len(prompts))]
    together = answered(engine.scheduler(slots=4, max_length=64, prompt_piece=piece), prompts, counts)
    for prompt, most, shared in zip(prompts, counts, together, strict=True):
        (own,) = answered(engine.scheduler(slots=1, max_length=64), [prompt], [most])
        tokens = [choice.token for choice in own]
        assert tokens == list(engine.generate(prompt, most, stop=False))
        assert [choice.token for choice in shared] == tokens
        np.testing.assert_allclose(logprobs(shared), logprobs(own), atol=tolerance, rtol=0)


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
