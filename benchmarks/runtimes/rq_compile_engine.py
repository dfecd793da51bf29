"""Our engine (an ``.onnx`` file): one sequence as ``rq-compile generate`` decodes it, several with the scheduler."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from worker import serve

from rq_compile.runtime.engine import Engine
from rq_compile.standalone.answer import Answer
from rq_compile.standalone.sampling import SamplingParams
from rq_compile.standalone.scheduler import Scheduler

LONGEST = 2048
MOST = 512  # tokens after a prompt


class RqCompileEngine:
    def __init__(self, path: Path, threads: int) -> None:
        self._engine = Engine.load(path, threads)
        self._stream: Iterator[int] = iter(())
        self._scheduler: Scheduler | None = None
        self._answers: list[Answer] = []

    def start(self, prompts: list[list[int]]) -> list[int]:
        if len(prompts) == 1:
            self._answers, self._stream = [], self._engine.generate(prompts[0], MOST, stop=False)
            return self.step()
        self._scheduler = self._engine.scheduler(slots=len(prompts), max_length=LONGEST)
        params = SamplingParams(temperature=0.0, max_tokens=MOST, ignore_eos=True)
        self._answers = [self._scheduler.submit(prompt, params) for prompt in prompts]
        while self._scheduler.waiting or self._scheduler._reading:
            self._scheduler.step()
        return self._newest()

    def step(self) -> list[int]:
        if not self._answers:
            return [next(self._stream)]
        assert self._scheduler is not None
        self._scheduler.step()
        return self._newest()

    def logits(self, prompt: list[int]) -> np.ndarray:
        return self._engine.logits(np.array([prompt]))[0, -1]

    def _newest(self) -> list[int]:
        """The last token of each answer. One whose prompt came first has more of them."""
        tokens = []
        for answer in self._answers:
            choice = answer.next()
            while not answer._choices.empty():
                choice = answer.next()
            assert choice is not None
            tokens.append(choice.token)
        return tokens


if __name__ == "__main__":
    serve(RqCompileEngine)
