"""Replaces Triton's onnxruntime backend, which is not in any package index: the same session from the same config, the same
batch from several requests. The server runs a copy of it as a ``model.py`` of its python backend."""

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime

# The parameters that the backend reads (ModelState and ModelInstanceState in its src/onnxruntime.cc); it ignores others.
PARAMETERS = {
    "execution_mode",
    "intra_op_thread_count",
    "inter_op_thread_count",
    "enable_mem_arena",
    "enable_mem_pattern",
    "memory.enable_memory_arena_shrinkage",
    "session.use_device_allocator_for_initializers",
    "share_session_between_instances",
}
CONFIG = "onnxruntime.json"


def open_session(config: dict, version: Path) -> onnxruntime.InferenceSession:
    """As the backend opens it; ``config`` is a ModelConfig as JSON with the message's own field names."""
    options = onnxruntime.SessionOptions()
    parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
    if (threads := int(parameters.get("intra_op_thread_count", "0"))) > 0:
        options.intra_op_num_threads = threads
    for library in config.get("model_operations", {}).get("op_library_filename", []):
        options.register_custom_ops_library(library)
    model = version / config.get("default_model_filename", "model.onnx")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        version = Path(args["model_repository"]) / args["model_version"]
        config = json.loads((version / CONFIG).read_text())
        self.session = open_session(config, version)
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests: list) -> list:
        import triton_python_backend_utils as backend

        time.sleep(0.02)  # so that further requests accumulate, as they would while a large engine runs
        feeds = [
            {name: backend.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs} for request in requests
        ]
        batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.inputs}
        outputs = self.session.run(self.outputs, batch)
        ends = np.cumsum([len(feed["input_ids"]) for feed in feeds])[:-1]
        parts = zip(*(np.split(output, ends) for output in outputs), strict=True)
        return [
            backend.InferenceResponse([backend.Tensor(*pair) for pair in zip(self.outputs, part, strict=True)]) for part in parts
        ]
