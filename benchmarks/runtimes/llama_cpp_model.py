"""llama.cpp (a ``.gguf`` file), by the C interface that llama-cpp-python offers, with llama.cpp's defaults.

Each number of sequences has a context of its own; all keep the keys and values in fp16.
"""

import ctypes
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from worker import serve

llama_cpp: Any = import_module("llama_cpp")  # to mypy, this name is a folder of the benchmarks

CONTEXT = 2048  # tokens of a sequence


class LlamaCppModel:
    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = threads
        self._contexts: dict[int, Any] = {}
        self._sequences, self._past = 1, 0
        self._last: list[int] = []

    def start(self, prompts: list[list[int]]) -> list[int]:
        self._sequences = len(prompts)
        if self._sequences not in self._contexts:
            self._contexts[self._sequences] = self._context(self._sequences)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._contexts[self._sequences]), True)
        self._past = 0
        return self._run(prompts)

    def step(self) -> list[int]:
        return self._run([[token] for token in self._last])

    def logits(self, prompt: list[int]) -> np.ndarray:
        self.start([prompt])
        return self._logits_of(len(prompt) - 1).copy()

    def _context(self, sequences: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = CONTEXT * sequences
        params.n_batch = CONTEXT
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        return llama_cpp.llama_init_from_model(self._model, params)

    def _run(self, rows: list[list[int]]) -> list[int]:
        """Append ``rows`` to the sequences, and return the most likely next token of each."""
        context, new = self._contexts[self._sequences], len(rows[0])
        batch = llama_cpp.llama_batch_init(new * len(rows), 0, 1)
        for row, tokens in enumerate(rows):
            for number, token in enumerate(tokens):
                at = row * new + number
                batch.token[at], batch.pos[at] = token, self._past + number
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = number == new - 1
        batch.n_tokens = new * len(rows)
        failed = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        self._past += new
        self._last = [int(self._logits_of((row + 1) * new - 1).argmax()) for row in range(len(rows))]
        return self._last

    def _logits_of(self, token: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._contexts[self._sequences], token)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._vocabulary,))


if __name__ == "__main__":
    serve(LlamaCppModel)
