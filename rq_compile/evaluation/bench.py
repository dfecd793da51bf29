"""Prefill and decode speed of one or two models, alternating in one process so that disturbances affect both equally."""

from collections.abc import Callable
from statistics import median
from time import perf_counter, sleep

import numpy as np

from rq_compile.engine.ranks import Ranks
from rq_compile.evaluation.machine import describe_machine
from rq_compile.evaluation.schema import Bench, Speed
from rq_compile.runtime.language_model import LanguageModel
from rq_compile.standalone.limits import default_threads

# Seconds before a model's turn. ONNX Runtime's threads were observed to spin for 55 ms after a run and slow the next model down.
REST = 0.2


def time_round(model: LanguageModel, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Prefill and decode in tokens per second: the time to the first token of ``prompt``, then the time between tokens.

    Waits first until the threads of the previous run are idle.
    """
    sleep(REST)
    start = perf_counter()
    stream = model.generate(prompt, new_tokens + 1, stop=False)
    next(stream)
    first = perf_counter()
    for _ in stream:
        pass
    return len(prompt) / (first - start), new_tokens / (perf_counter() - first)


def bench(
    engine: LanguageModel,
    other: LanguageModel | None,
    *,
    names: tuple[str, str],
    weights_sha256: str | None = None,
    vocabulary: int,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    ranks: Ranks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Time ``engine`` and ``other`` on the same random prompt (fixed seed) with batch 1. One warm-up round is not recorded.

    ``ranks``: the processes that run both. Each has a prompt of its own, and the speed is that of all together.
    ``weights_sha256`` identifies the engine, together with its name. ``threads``: number of threads of the models.
    """
    prompt = np.random.default_rng(ranks.rank if ranks else 0).integers(0, vocabulary, prompt_tokens).tolist()
    models = [engine] if other is None else [engine, other]
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for round in range(rounds + 1):
        for model, recorded in zip(models, times, strict=True):
            speed = time_round(model, prompt, new_tokens)
            if ranks is not None:
                prefill, decode = zip(*ranks.gather(speed), strict=True)
                speed = sum(prefill), sum(decode)
            if round > 0:
                recorded.append(speed)
        if progress is not None:
            progress(round + 1, rounds + 1)
    speeds = [
        Speed(name=name, prefill=median(p for p, _ in recorded), decode=median(d for _, d in recorded))
        for name, recorded in zip(names, times, strict=False)
    ]
    ours, theirs = speeds[0], speeds[1] if other is not None else None
    return Bench(
        machine=describe_machine(),
        weights_sha256=weights_sha256,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads or default_threads(),
        engine=ours,
        other=theirs,
        ratio_prefill=ours.prefill / theirs.prefill if theirs else None,
        ratio_decode=ours.decode / theirs.decode if theirs else None,
    )
