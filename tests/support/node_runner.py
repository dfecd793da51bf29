"""Runs models of single nodes of rq.moe: in this process, or in one with another Python, such as that of an emulated processor.

Needs only numpy and ONNX Runtime. As a program, with the path of an op library, it runs the models that it reads from stdin.
"""

import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime

Feeds = Mapping[str, np.ndarray]


def run(model: bytes, feeds: Feeds, threads: int, library: str) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library)
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)


class Runner:
    """A process of `command`, which runs this program."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, model: bytes, feeds: Feeds, threads: int) -> list[np.ndarray]:
        assert self._process.stdin
        assert self._process.stdout
        pickle.dump((model, dict(feeds), threads), self._process.stdin)
        self._process.stdin.flush()
        outputs = pickle.load(self._process.stdout)
        if isinstance(outputs, str):
            raise RuntimeError(outputs)
        return outputs


def main(library: str) -> None:
    while True:
        try:
            model, feeds, threads = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            outputs: list[np.ndarray] | str = run(model, feeds, threads, library)
        except Exception as error:  # ONNX Runtime's errors cannot be pickled
            outputs = str(error)
        pickle.dump(outputs, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1])
