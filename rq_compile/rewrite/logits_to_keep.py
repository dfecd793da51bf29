"""Pass: the graph input ``logits_to_keep`` becomes a constant, for runtimes that do not support default values of inputs.

The input is the number of last tokens of each row for which logits are computed; 0 means all. With a vocabulary of 150 000, the
logits of a prompt of 2000 tokens take 1.2 GB, and generation reads those of the last token alone, so 1 is the input's default
(``export/logits_to_keep.py``). The name and the meaning of 0 are those of transformers' ``forward``.

Requires: nothing. Ensures: there is no such input, and the logits' shape says how many positions they have.
"""

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.report import PassReport
from rq_compile.standalone.decoding import ALL

NAME = "logits_to_keep"
POSITIONS_AXIS = 1
FIRST_ROW = f"{NAME}.first_row"


def fixed(graph: gs.Graph, count: int) -> PassReport:
    """Fix the input of ``graph`` at ``count``, in place; a model without it always computes all logits."""
    report = PassReport(f"{NAME} inputs", "fixed")
    for given in [tensor for tensor in graph.inputs if tensor.name == NAME]:
        graph.inputs.remove(given)
        # A parser may require the bounds of a slice to be constants.
        (negation,) = given.outputs
        (negative,) = negation.outputs
        (slicing,) = negative.outputs
        slicing.inputs[1] = gs.Constant(FIRST_ROW, np.array([-count], np.int64))
        graph.nodes.remove(negation)
        negation.inputs.clear()
        negation.outputs.clear()
        (logits,) = (tensor for tensor in graph.outputs if tensor.name == "logits")
        logits.shape = [*logits.shape]
        logits.shape[POSITIONS_AXIS] = "sequence" if count == ALL else count
        report.changed += 1
    ensures(NAME, all(tensor.name != NAME for tensor in graph.inputs), "that the input is gone")
    return report
