"""Where does the time of a server's step go? The load of serving.py on the scheduler alone: no server, no clients.

The sequences in the slots are those that eight clients of serving.py would send. Each request that ends is followed by the next
at once. "tokens_per_s" is what a server could give if everything else took no time. The other columns are shares of the time:
"decode_engine" is in ONNX Runtime for steps of all sequences, "prompts_engine" for pieces of prompts, "regroup" copies caches
when sequences join and leave, and "python" is the rest (samplers, queues, masks). "padding" is the share of the caches in a
decoding step that the mask excludes. "one_step_ms" is a step of 1, 8 and 16 sequences with about 200 tokens each in the cache.

    python benchmarks/serving.py --folder /scratch --only-make
    python benchmarks/serving_steps.py --folder /scratch --model sample

A row is written to benchmarks/results/serving_steps.json, and replaces one of the same model.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from provenance import processor, provenance
from servers import LONGEST, THREADS
from serving import MODELS, SLOTS, requests

from rq_compile.standalone.answer import Answer
from rq_compile.standalone.batch import Batch
from rq_compile.standalone.decoding import open_session
from rq_compile.standalone.sampling import SamplingParams
from rq_compile.standalone.scheduler import Scheduler
from rq_compile.standalone.step_model import EngineSteps

RESULTS = Path(__file__).parent / "results" / "serving_steps.json"
SPIN = 100  # as in the package for Triton
CACHED = 100  # tokens, twice


class Timed:
    """Adds up the seconds of functions by name."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def __call__(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - begun  # type: ignore[assignment]

        return timed


def one_step(steps: EngineSteps, rows: int, count: int) -> float:
    """Milliseconds, the median of ``count`` steps."""
    random = np.random.default_rng(0)
    alone = []
    for _ in range(rows):
        alone.append(Batch(steps))
        alone[-1].begin(LONGEST)
        for _ in range(2):
            alone[-1].step(random.integers(1, steps.vocabulary, (1, CACHED)))
    together = Batch(steps)
    together.arrange([], alone, LONGEST)
    took = []
    for _ in range(count):
        begun = time.perf_counter()
        together.step(random.integers(1, steps.vocabulary, (rows, 1)))
        took.append(time.perf_counter() - begun)
    return round(1e3 * median(took), 2)


def load(steps: EngineSteps, seconds: float) -> dict[str, float]:
    """The shares, while ``SLOTS`` clients ask one request after another."""
    scheduler, timed = Scheduler(steps, SLOTS, LONGEST), Timed()
    asked = [requests(number, steps.vocabulary) for number in range(SLOTS)]
    step, columns, used = steps.step, 0, 0

    def by_kind(ids: np.ndarray, mask: np.ndarray, *rest: Sequence[np.ndarray]) -> np.ndarray:
        nonlocal columns, used
        decoding = ids.shape[1] == 1
        if decoding:
            columns, used = columns + mask.size, used + int(mask.sum())
        return timed("decode_engine" if decoding else "prompts_engine", step)(ids, mask, *rest)

    steps.step = by_kind  # type: ignore[assignment]
    scheduler._regroup = timed("regroup", scheduler._regroup)  # type: ignore[method-assign]

    def ask(client: int) -> Answer:
        prompt, most = next(asked[client])
        return scheduler.submit(prompt, SamplingParams(temperature=0, max_tokens=most, ignore_eos=True))

    answers = [ask(client) for client in range(SLOTS)]
    tokens, begun = 0, time.perf_counter()
    warm = begun + seconds / 4
    while (now := time.perf_counter()) < begun + seconds:
        if now < warm:
            tokens, measured = 0, now
            timed.seconds.clear()
        scheduler.step()
        for client, answer in enumerate(answers):
            while True:
                try:
                    choice = answer.next(timeout=0)
                except TimeoutError:
                    break
                if choice is None:
                    answers[client] = ask(client)
                    break
                tokens += 1
    took = now - measured
    steps.step = step
    shares = {name: round(spent / took, 3) for name, spent in sorted(timed.seconds.items())}
    python, padding = round(1 - sum(timed.seconds.values()) / took, 3), round(1 - used / columns, 3)
    return {"tokens_per_s": round(tokens / took), **shares, "python": python, "padding": padding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the folder of serving.py")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    settings = parser.parse_args()
    for name in settings.model:
        version = settings.folder / name / "rq-compile" / "model" / "1"
        manifest = json.loads((version / "model.json").read_text())
        session = open_session(version / "model.onnx", manifest, version / "librq_moe.so", THREADS, SPIN)
        steps = EngineSteps(session, manifest)
        by_rows = {str(count): one_step(steps, count, 30) for count in (1, 8, 16)}
        row = {"model": name, "one_step_ms": by_rows, **load(steps, settings.seconds), "slots": SLOTS, "threads": THREADS}
        row |= {"processor": processor(), **provenance("rq-compile", "onnxruntime", "numpy")}
        print(json.dumps(row), flush=True)
        known = json.loads(settings.output.read_text()) if settings.output.exists() else []
        kept = [other for other in known if other["model"] != name]
        settings.output.write_text(json.dumps([*kept, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
