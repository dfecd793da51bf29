"""Adds standard ONNX nodes to a graph-surgeon graph in a short notation."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs


class Ops:
    """Appends nodes to ``graph``, with names that start with ``prefix``: ``ops("Add", a, b)`` returns the sum.

    Python numbers, lists and arrays become constants (whole numbers int64). ``domain`` and ``out`` (an output tensor, or
    its name) are keywords; all others are attributes. Returns one tensor, or a tuple when ``outputs`` is above 1.
    """

    def __init__(self, graph: gs.Graph, prefix: str) -> None:
        self.graph, self.prefix, self.count = graph, prefix, 0

    def __call__(
        self, op: str, *inputs: Any, out: gs.Tensor | str | None = None, outputs: int = 1, domain: str | None = None, **attrs: Any
    ) -> Any:
        name = self._name(op)
        if out is None or isinstance(out, str):
            results = [gs.Variable(out or (f"{name}:{i}" if i else name)) for i in range(outputs)]
        else:
            results = [out]
        operands = [value if isinstance(value, gs.Tensor) else self.constant(value) for value in inputs]
        self.graph.nodes.append(gs.Node(op, name, attrs, operands, results, domain=domain))
        return results[0] if outputs == 1 else tuple(results)

    def constant(self, value: Any) -> gs.Constant:
        return gs.Constant(self._name("constant"), np.array(value))

    def _name(self, op: str) -> str:
        self.count += 1
        return f"{self.prefix}/{op}_{self.count}"
