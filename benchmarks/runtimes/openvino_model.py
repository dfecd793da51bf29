"""OpenVINO (a folder written by ``optimum-cli export openvino``): a stateful model, with OpenVINO's defaults for the CPU.

As OpenVINO GenAI does, the head is made to compute the logits of the last token only.
"""

from pathlib import Path

import numpy as np
import openvino
from openvino import opset13
from worker import serve


class OpenVinoModel:
    def __init__(self, path: Path, threads: int) -> None:
        core = openvino.Core()
        model = core.read_model(path / "openvino_model.xml")
        keep_last_token(model)
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._request = core.compile_model(model, "CPU", options).create_infer_request()
        self._inputs = {name for tensor in model.inputs for name in tensor.names}
        self._past = 0
        self._logits = np.empty(0)

    def start(self, prompts: list[list[int]]) -> list[int]:
        self._request.reset_state()
        self._past = 0
        return self._run(np.array(prompts, np.int64))

    def step(self) -> list[int]:
        return self._run(self._logits.argmax(-1)[:, None])

    def logits(self, prompt: list[int]) -> np.ndarray:
        self.start([prompt])
        return self._logits[0].astype(np.float32)

    def _run(self, ids: np.ndarray) -> list[int]:
        rows, new = ids.shape
        positions = np.arange(self._past, self._past + new, dtype=np.int64)
        self._past += new
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, self._past), np.int64),
            "position_ids": np.tile(positions, (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        self._request.infer({name: value for name, value in given.items() if name in self._inputs})
        self._logits = self._request.get_tensor("logits").data[:, -1]
        return self._logits.argmax(-1).tolist()


def keep_last_token(model: openvino.Model) -> None:
    """Slice the input of the head, which is the product before the output."""
    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden = node.input_value(0)
    begin, end, step, axis = (opset13.constant(np.array([value])) for value in (-1, np.iinfo(np.int64).max, 1, 1))
    node.input(0).replace_source_output(opset13.slice(hidden, begin, end, step, axis).output(0))
    model.validate_nodes_and_infer_types()


if __name__ == "__main__":
    serve(OpenVinoModel)
