"""onnxruntime-genai (a folder written by build_onnxruntime_genai.py)."""

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai
from worker import serve

LONGEST = 2048


class OnnxRuntimeGenaiModel:
    def __init__(self, path: Path, threads: int) -> None:
        config = onnxruntime_genai.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = onnxruntime_genai.Model(config)
        self._generator: onnxruntime_genai.Generator | None = None

    def start(self, prompts: list[list[int]]) -> list[int]:
        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=LONGEST, batch_size=len(prompts))
        self._generator = None
        self._generator = onnxruntime_genai.Generator(self._model, params)
        self._generator.append_tokens(np.array(prompts, np.int32))
        return self.step()

    def step(self) -> list[int]:
        assert self._generator is not None
        self._generator.generate_next_token()
        return [int(token) for token in self._generator.get_next_tokens()]

    def logits(self, prompt: list[int]) -> np.ndarray:
        self.start([prompt[:-1]])
        assert self._generator is not None
        self._generator.rewind_to(len(prompt) - 1)
        self._generator.append_tokens(np.array([prompt[-1:]], np.int32))
        return self._generator.get_logits().reshape(-1).astype(np.float32)


if __name__ == "__main__":
    serve(OnnxRuntimeGenaiModel)
