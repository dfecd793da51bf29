"""A runtime in a process of its own, with its own Python packages: reads requests as lines of JSON and answers each with one.

Each runtime has a module beside this one, which calls ``serve`` and can be started by hand:

    echo '{"do": "round", "prompts": [[1, 2, 3]], "steps": 4}' | python benchmarks/runtimes/llama_cpp_model.py model.gguf 2
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np


class LanguageModel(Protocol):
    """A loaded model that continues sequences, each step with the most likely token."""

    def start(self, prompts: list[list[int]]) -> list[int]:
        """Forget earlier sequences, read ``prompts`` (of equal length) and return the first token after each."""
        ...

    def step(self) -> list[int]:
        """The next token of each sequence."""
        ...

    def logits(self, prompt: list[int]) -> np.ndarray:
        """Logits fp32 ``[vocabulary]`` of the token after ``prompt``."""
        ...


def serve(load: Callable[[Path, int], LanguageModel]) -> None:
    """Load the model that the command line names, on as many threads, and answer requests until standard input ends.

    - ``{"do": "round", "prompts": [[id, ...], ...], "steps": n}``: seconds to the first tokens and of the steps after, and tokens
    - ``{"do": "logits", "prompt": [id, ...], "path": "x.npy"}``: writes the logits
    - ``{"do": "memory"}``: resident bytes now, and the most so far

    The first answer says how many seconds loading took, including one token: weights that are mapped are read only then.
    """
    path, threads = Path(sys.argv[1]), int(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print, too

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    begun = perf_counter()
    model = load(path, threads)
    model.start([[1]])
    answer(load_s=perf_counter() - begun)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "round":
            answer(**timed(model, request["prompts"], request["steps"]))
        elif request["do"] == "logits":
            np.save(request["path"], model.logits(request["prompt"]))
            answer()
        elif request["do"] == "memory":
            answer(**memory())


def timed(model: LanguageModel, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    begun = perf_counter()
    tokens = [model.start(prompts)]
    first = perf_counter()
    tokens += [model.step() for _ in range(steps)]
    return {"prefill_s": first - begun, "decode_s": perf_counter() - first, "tokens": tokens}


def memory() -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    sizes = {key: int(size) * 1024 for key, size in re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", status, re.MULTILINE)}
    return {"resident": sizes["VmRSS"], "peak": sizes["VmHWM"]}
