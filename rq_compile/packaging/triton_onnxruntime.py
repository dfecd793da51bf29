"""Triton's own ONNX Runtime backend: tensors in, tensors out; the client carries the KV cache from step to step.

``src/onnxruntime.cc`` of triton-inference-server/onnxruntime_backend shows how the backend reads a config.
"""

import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rq_compile.calibration.schema import Calibration
from rq_compile.engine.library import library_path
from rq_compile.engine.manifest import Manifest
from rq_compile.errors import UserError
from rq_compile.files import read_document, sha256
from rq_compile.lowerings import LOWERINGS
from rq_compile.lowerings.batched import FOLDING_LIMIT
from rq_compile.packaging.edge import cache_remarks
from rq_compile.packaging.triton_config import Tensor, messages, model_config
from rq_compile.planning.schema import Plan

MOUNT = "/models"
# The default batch size and sequence length of calibrations.
BATCH_SIZE, SEQUENCE_LENGTH = 8, 256
ONES = "ones"


def write(
    engine: Path,
    manifest: Manifest,
    model: Path,
    mount: str = MOUNT,
    instances: int = 1,
    threads: int = 0,
    calibration: Path | None = None,
) -> tuple[Any, list[str]]:
    """Complete ``model`` (the folder with the engine in ``1/``). Returns its ``ModelConfig`` and remarks.

    ``mount``: the path at which the server will see the repository. ``threads``: threads of an instance; 0 means ONNX Runtime's
    choice. The workload (requests that run together, tokens of a prompt) is that of ``calibration``.

    Raises:
        UserError: ``mount`` is not absolute, or ``calibration`` is not the one that the engine was planned with.
    """
    if not PurePosixPath(mount).is_absolute():
        raise UserError(
            f"--mount {mount} is not an absolute path, so the server would look in its working directory; "
            "give a path that begins with /",
            2,
        )
    batch_size, length = workload(manifest.plan, calibration)
    inputs, outputs = graph_tensors(engine)
    parameters = {"intra_op_thread_count": str(threads)}
    if instances > 1:
        # Older backends ignore this setting and hold the weights once per instance.
        parameters["share_session_between_instances"] = "true"
    config = model_config(model.name, "onnxruntime", inputs, outputs, parameters)
    config.default_model_filename = engine.name
    config.max_batch_size = batch_size
    config.instance_group.add(kind=messages().ModelInstanceGroup.KIND_CPU, count=instances)

    remarks = cache_remarks(manifest)
    if mixed_copies(manifest.plan):
        remarks.append("copies of an expert differ in format, so an answer depends on its batch: requests are not batched")
    elif batch_size > 1:
        # No delay: requests that arrive while a batch runs form the next batch.
        config.dynamic_batching.SetInParent()
        remarks.append("requests share a batch only while their shapes are equal: the same numbers of new and of cached tokens")
    if manifest.op_library is not None:
        name = library_name(library_path())
        shutil.copyfile(library_path(), model / "1" / name)
        config.model_operations.op_library_filename.append(str(PurePosixPath(mount, model.name, "1", name)))
        remarks.append(f"the server must see this folder at {mount}: it loads the op library from there")
    if (wide := half_precision_bytes(manifest)) > 0:
        remarks.append(
            f"the backend cannot stop ONNX Runtime from unpacking up to {wide:,} bytes of 16-bit weights to twice as many"
        )
    warm_up(config, model, {"prompt": (length, 0), "step": (1, length)})
    return config, remarks


def workload(plan: Plan, calibration: Path | None) -> tuple[int, int]:
    """The number of sequences that run together, and the tokens of each."""
    if calibration is None:
        return BATCH_SIZE, SEQUENCE_LENGTH
    document = read_document(Calibration, calibration)
    if sha256(calibration) != plan.calibration_sha256:
        raise UserError(f"the engine was not planned with {calibration}; give its own calibration or leave it out", 2)
    return document.batch_size, document.sequence_length


def graph_tensors(engine: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of the graph, without the batch, their first dimension."""
    import onnx

    graph = onnx.load(engine, load_external_data=False).graph

    def tensor(value: onnx.ValueInfoProto) -> Tensor:
        kind = value.type.tensor_type
        dims = tuple(-1 if dim.dim_param else dim.dim_value for dim in kind.shape.dim)
        return Tensor(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), dims[1:])

    # Inputs with a default are left out, because clients of this backend would have to give them a batch dimension.
    defaults = {initializer.name for initializer in graph.initializer}
    return [tensor(value) for value in graph.input if value.name not in defaults], [tensor(value) for value in graph.output]


def library_name(library: Path) -> str:
    """A name with a hash of the content, because a running server keeps the library that it first loaded from a path."""
    return f"{library.stem}.{sha256(library)[:16]}{library.suffix}"


def mixed_copies(plan: Plan) -> bool:
    return any(
        len({slot.format for slot in layer.slots if slot.expert == expert}) > 1
        for layer in plan.layers
        for expert in {slot.expert for slot in layer.slots}
    )


def half_precision_bytes(manifest: Manifest) -> int:
    """Bytes of 16-bit experts that constant folding would unpack. Only the standard ops of the batched lowering have any."""
    if LOWERINGS[manifest.lowering].session_options != FOLDING_LIMIT:
        return 0
    wide = [(layer, slot) for layer in manifest.plan.layers for slot in layer.slots if slot.format in ("bf16", "fp16")]
    return sum(layer.geometry.expert_bytes(slot.format) for layer, slot in wide)


def warm_up(config: Any, model: Path, requests: dict[str, tuple[int, int]]) -> None:
    """Requests to be run before the model counts as loaded: name -> new and cached tokens."""
    folder = model / "warmup"
    folder.mkdir()
    for name, (new, cached) in requests.items():
        request = config.model_warmup.add(name=name, batch_size=1)
        for tensor in config.input:
            entry = request.inputs[tensor.name]
            entry.data_type = tensor.data_type
            if tensor.name == "attention_mask":
                entry.dims.append(new + cached)
                entry.input_data_file = f"{name}.{ONES}"
                (folder / entry.input_data_file).write_bytes(np.ones(new + cached, np.int64).tobytes())
                continue
            entry.zero_data = True
            # A variable dimension is the number of new tokens for ids and positions, and of cached tokens for keys and values.
            varying = cached if len(tensor.dims) > 1 else new
            entry.dims.extend(varying if dim == -1 else dim for dim in tensor.dims)
