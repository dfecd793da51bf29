"""Stacks of MoE layers without anything between them, as graphs for the processes of ranks.py."""

from pathlib import Path
from typing import Any

import numpy as np


def stack(plan: Any) -> Any:
    """Experts nodes, one after the other, each with its own ids and gates."""
    from onnx import TensorProto, helper

    geometry, inputs, nodes, value = plan.layers[0].geometry, [("x", TensorProto.FLOAT, plan.layers[0].geometry.hidden)], [], "x"
    for number, layer in enumerate(plan.layers):
        ids, gates, y = f"ids{number}", f"gates{number}", f"y{number}"
        nodes.append(helper.make_node("Experts", [value, ids, gates], [y], domain="rq.moe", layer=layer.name))
        inputs += [(ids, TensorProto.INT64, geometry.top_k), (gates, TensorProto.FLOAT, geometry.top_k)]
        value = y
    described = [helper.make_tensor_value_info(name, kind, ["T", size]) for name, kind, size in inputs]
    result = helper.make_tensor_value_info(value, TensorProto.FLOAT, ["T", geometry.hidden])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("rq.moe", 1)]
    return helper.make_model(helper.make_graph(nodes, "stack", described, [result]), opset_imports=imports, ir_version=10)


def write_stack(plan: Any, folder: Path) -> None:
    from rq_compile.architectures.layers import ExpertWeights
    from rq_compile.lowerings.ranks import Ranks
    from rq_compile.targets.weights_file import locate, write_weights

    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(plan.model_dump_json())
    geometry, random = plan.layers[0].geometry, np.random.default_rng(0)
    up, down = (
        (random.standard_normal(shape, np.float32) / np.sqrt(shape[1]))
        for shape in ((geometry.up_rows, geometry.hidden), (geometry.hidden, geometry.intermediate))
    )
    biases = (np.zeros(len(up), np.float32), np.zeros(len(down), np.float32)) if geometry.bias else (None, None)
    expert = ExpertWeights(up, down, *biases)  # the same for all: times do not depend on the values
    for rank, lowered in enumerate(Ranks().graphs(stack(plan), plan, lambda layer, number: expert)):
        data = folder / f"rank{rank}.data"
        with data.open("wb+") as file:
            written = write_weights(lowered.experts, file)
        locate(lowered.model, written.starts, data.name)
        (folder / f"rank{rank}.onnx").write_bytes(lowered.model.SerializeToString())


def open_stack(folder: Path, rank: int) -> Any:
    import onnxruntime

    from rq_compile.engine.library import MPI_LIBRARY, library_path

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for library in (library_path(), library_path(MPI_LIBRARY)):
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(folder / f"rank{rank}.onnx"), options, providers=["CPUExecutionProvider"])
