"""Matrices that an engine multiplies one tensor by, and that its weights file therefore holds together."""

from pathlib import Path

import onnx


def behind_others(engine: Path) -> int:
    """How many matrices are written behind another one instead of beginning a page."""
    graph = onnx.load(engine, load_external_data=False).graph
    return sum(len(node.output) - 1 for node in graph.node if node.op_type == "DenseGemm")
