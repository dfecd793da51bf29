"""The graph input ``logits_to_keep``: of how many last tokens of each row the logits are computed; 0: of all.

With a vocabulary of 150 000, the logits of a prompt of 2000 tokens take 1.2 GB, and generation reads those of the last token
alone. The name and the meaning of 0 are those of transformers' ``forward``.
"""

from copy import deepcopy

import numpy as np
import onnx

from rq_compile.standalone.decoding import ALL

NAME = "logits_to_keep"
POSITIONS_AXIS = 1
FIRST_ROW = f"{NAME}.first_row"


def with_default(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """A copy in which the input need not be given: then it is ``count``. A model without the input is returned as it is."""
    if NAME not in [value.name for value in model.graph.input]:
        return model
    made = deepcopy(model)
    others = [initializer for initializer in made.graph.initializer if initializer.name != NAME]
    del made.graph.initializer[:]
    made.graph.initializer.extend([*others, onnx.numpy_helper.from_array(np.array([count], np.int64), NAME)])
    return made


def fixed(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """A copy whose input is the constant ``count``, for runtimes that know no defaults."""
    made = with_default(model, count)
    if made is model:
        return model
    inputs = [value for value in made.graph.input if value.name != NAME]
    del made.graph.input[:]
    made.graph.input.extend(inputs)
    # A parser may want the bounds of a slice as constants.
    (negation,) = (node for node in made.graph.node if NAME in node.input)
    (slicing,) = (node for node in made.graph.node if negation.output[0] in node.input)
    slicing.input[1] = FIRST_ROW
    made.graph.node.remove(negation)
    made.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(np.array([-count], np.int64), FIRST_ROW))
    logits = next(value for value in made.graph.output if value.name == "logits")
    positions = logits.type.tensor_type.shape.dim[POSITIONS_AXIS]
    positions.Clear()
    if count == ALL:
        positions.dim_param = "sequence"
    else:
        positions.dim_value = count
    return made
