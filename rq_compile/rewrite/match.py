"""Finds the ops that torch's exporter writes for a formula: patterns of ops, matched from the result to the operands."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from rq_compile.rewrite.weights import external_proto

# The name of a tensor; or an op, optionally a dict of required attributes, and the patterns of its first inputs.
Pattern = str | tuple[Any, ...]
COMMUTATIVE = ("Add", "Mul")
TO_THE_END = np.iinfo(np.int64).max


def match(tensor: gs.Tensor, pattern: Pattern) -> dict[str, gs.Tensor] | None:
    """The tensors that ``pattern`` names, if ``tensor`` is computed in this way. A name that appears twice stands for one tensor.

    Operands of a sum or a product may be in either order, and a Slice that keeps everything is ignored.
    """
    return next(_matches(tensor, pattern, {}), None)


def numbers(tensor: gs.Tensor) -> list[float]:
    """The values of a small constant, as a flat list; empty if ``tensor`` is computed, or is a weight."""
    if not isinstance(tensor, gs.Constant) or external_proto(tensor) is not None:
        return []
    return tensor.values.reshape(-1).tolist()


def concatenated(tensor: gs.Tensor) -> list[int | None]:
    """The parts of a shape that is concatenated from single numbers: constants, and None for computed numbers."""
    parts = [numbers(part) for node in tensor.inputs if node.op == "Concat" for part in node.inputs]
    return [int(part[0]) if len(part) == 1 else None for part in parts]


def _matches(tensor: gs.Tensor, pattern: Pattern, bound: dict[str, gs.Tensor]) -> Iterator[dict[str, gs.Tensor]]:
    tensor = _seen_through(tensor)
    if isinstance(pattern, str):
        if bound.get(pattern, tensor) is tensor:
            yield {**bound, pattern: tensor}
        return
    op, *operands = pattern
    attributes = operands.pop(0) if isinstance(operands[0], dict) else {}
    for node in tensor.inputs:
        if node.op != op or any(node.attrs.get(name) != value for name, value in attributes.items()):
            continue
        yield from _all_match(node.inputs, operands, bound)
        if op in COMMUTATIVE:
            yield from _all_match(node.inputs[::-1], operands, bound)


def _all_match(
    tensors: Sequence[gs.Tensor], patterns: Sequence[Pattern], bound: dict[str, gs.Tensor]
) -> Iterator[dict[str, gs.Tensor]]:
    if not patterns:
        yield bound
    elif tensors:
        for found in _matches(tensors[0], patterns[0], bound):
            yield from _all_match(tensors[1:], patterns[1:], found)


def _seen_through(tensor: gs.Tensor) -> gs.Tensor:
    while tensor.inputs and tensor.inputs[0].op == "Slice":
        source, start, end, *axes_and_steps = tensor.inputs[0].inputs
        steps = numbers(axes_and_steps[1]) if len(axes_and_steps) > 1 else [1]
        if numbers(start) != [0] or numbers(end) != [TO_THE_END] or steps != [1]:
            break
        tensor = source
    return tensor
