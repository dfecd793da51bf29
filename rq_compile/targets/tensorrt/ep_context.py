"""An ONNX model that makes an execution provider of ONNX Runtime load an engine: one node, ``com.microsoft::EPContext``.

The attributes are those that ONNX Runtime's TensorRT and NvTensorRTRTX providers write when they save a context themselves: with
``embed_mode`` 0, ``ep_cache_context`` is the name of the engine's file in the model's folder.
"""

import onnx
from onnx import helper

from rq_compile.targets.tensorrt.manifest import TensorRTTarget

DOMAIN = "com.microsoft"
PROVIDERS: dict[TensorRTTarget, str] = {
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


def ep_context(
    network: onnx.ModelProto, engine: str, target: TensorRTTarget, capabilities: list[int], sdk: str
) -> onnx.ModelProto:
    """A model with the inputs and outputs of ``network`` that loads the file ``engine`` beside it.

    ``capabilities``: those of the GPUs that it was built for; ``sdk``: the builder's version, or empty.
    """
    graph = network.graph
    node = helper.make_node(
        "EPContext",
        [value.name for value in graph.input],
        [value.name for value in graph.output],
        "engine",
        domain=DOMAIN,
        main_context=1,
        embed_mode=0,
        ep_cache_context=engine,
        ep_sdk_version=sdk or None,
        # The providers compare it with their GPU's capability, and cannot read a list.
        hardware_architecture=str(capabilities[0]) if len(capabilities) == 1 else None,
        partition_name="engine",
        source=PROVIDERS[target],
    )
    made = helper.make_graph([node], "engine", graph.input, graph.output)
    imports = [entry for entry in network.opset_import if not entry.domain]
    return helper.make_model(
        made, opset_imports=[*imports, helper.make_opsetid(DOMAIN, 1)], ir_version=network.ir_version, producer_name="rq-compile"
    )
