"""Triton's python backend: text in, text streamed out, with the KV cache in the server. The folder can be anywhere."""

import shutil
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from rq_compile.engine.library import library_path
from rq_compile.engine.manifest import Manifest
from rq_compile.packaging.edge import EXAMPLE, OP_LIBRARY, SHARED
from rq_compile.packaging.triton_config import TEXT, Tensor, messages, model_config
from rq_compile.standalone import answer, batch, chat_template, inbox, prefix_cache, request_parameters, scheduler, step_model

MODEL = Path(__file__).parent / "triton_files" / "model.py"
README = MODEL.with_name("README.md")
# Modules that only a server needs.
SERVED_WITH = (answer, batch, chat_template, inbox, prefix_cache, request_parameters, scheduler, step_model)
SERVING = tuple(Path(module.__file__) for module in SERVED_WITH if module.__file__)
INT64 = np.dtype(np.int64)
# The names that the generate extension and other text backends of Triton use.
INPUTS = (
    Tensor("text_input", TEXT, (1,), optional=True),
    Tensor("input_ids", INT64, (-1,), optional=True),
    Tensor("max_tokens", np.dtype(np.int32), (1,), optional=True),
    Tensor("stream", np.dtype(np.bool_), (1,), optional=True),
    Tensor("messages", TEXT, (1,), optional=True),
    *(Tensor(name, np.dtype(kind), (count,), optional=True) for name, (kind, count) in request_parameters.PARAMETERS.items()),
)
OUTPUTS = (Tensor("text_output", TEXT, (1,)), Tensor("token_ids", INT64, (-1,)), Tensor("logprobs", TEXT, (1,)))


def write(engine: Path, manifest: Manifest, model: Path, threads: int = 0) -> tuple[Any, list[str]]:
    """Complete ``model`` (the folder with the engine in ``1/``). Returns its ``ModelConfig`` and remarks.

    ``threads``: threads of one step; 0 means ONNX Runtime's choice.
    """
    for source in (MODEL, EXAMPLE, *SHARED, *SERVING):
        shutil.copyfile(source, model / "1" / source.name)
    if manifest.op_library is not None:
        shutil.copyfile(library_path(), model / "1" / OP_LIBRARY)
    needed = ["onnxruntime", "tokenizers", *(["jinja2"] if manifest.chat_template is not None else [])]
    remark = f"the server's Python needs {' and '.join(needed)}: pip install {' '.join(needed)}"
    return config(model.name, threads, manifest.context_length), [remark]


def readme(name: str, manifest: Manifest) -> str:
    asked = '"input_ids": [1, 2, 3]' if manifest.tokenizer is None else '"text_input": "Once upon a time"'
    return Template(README.read_text(encoding="utf-8")).substitute(name=name, tool=manifest.tool, asked=asked)


def config(name: str, threads: int, context_length: int | None) -> Any:
    parameters = {
        "intra_op_thread_count": str(threads),
        "concurrent_requests": str(scheduler.SLOTS),
        "max_sequence_length": str(context_length or scheduler.MAX_LENGTH),
        "prompt_piece": str(scheduler.PROMPT_PIECE),
        "max_cache_bytes": "0",
    }
    config = model_config(name, "python", INPUTS, OUTPUTS, parameters)
    config.instance_group.add(kind=messages().ModelInstanceGroup.KIND_CPU, count=1)
    config.model_transaction_policy.decoupled = True
    return config
