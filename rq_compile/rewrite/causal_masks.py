"""Pass: the nodes that compute a causal mask, about forty for each mask, become one CausalMask.

A mask is recognized by what it computes, not by its nodes: it depends on nothing but the attention mask and sizes, and in ONNX
Runtime it is equal to that of the op on batches of many sizes, with padding of every kind. Masks that differ, such as those of
chunked attention, stay as they are.

Requires: nothing. Ensures: causal masks, also those with a sliding window, are one node for each window.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime

from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.experts_to_slots import DOMAIN
from rq_compile.rewrite.match import numbers
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.report import NearMatch, PassReport
from rq_compile.rewrite.weights import external_proto

NAME = "causal_masks"
OP = "CausalMask"
ATTENTION_MASK, TOKENS = "attention_mask", "input_ids"
RANK = 4  # [batch, 1, sequence, tokens]
SEQUENCES = 4
NO_WINDOW = -1
LONGEST_WINDOW = 1 << 20
# The sizes of the batches that are compared: new tokens and those before them. With a window, there are also all of STEPS, after
# as many tokens as the window has and the numbers of AROUND_A_WINDOW.
SIZES = ((1, 0), (3, 0), (1, 7), (4, 9), (70, 0), (70, 45))
STEPS = (1, 2, 5)
AROUND_A_WINDOW = (-2, -1, 0, 1, 40)


def causal_masks(graph: gs.Graph) -> PassReport:
    """Rewrite every such mask of ``graph`` in place."""
    op, report = Ops(graph, NAME), PassReport("causal masks")
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    made: dict[int, gs.Tensor] = {}
    for mask, window in [(mask, _window(mask, graph)) for mask in _masks(graph)]:
        if isinstance(window, NearMatch):
            report.leave(window.why)
            continue
        report.changed += 1
        if window not in made:
            made[window] = op(OP, inputs[ATTENTION_MASK], inputs[TOKENS], local_window_size=window, domain=DOMAIN)
        for reader in list(mask.outputs):
            reader.inputs = [made[window] if tensor is mask else tensor for tensor in reader.inputs]
    graph.cleanup().toposort()
    left = [mask for mask in _masks(graph) if not isinstance(_window(mask, graph), NearMatch)]
    ensures(NAME, not left, "that no causal mask is left in parts")
    return report


def computed(attention_mask: np.ndarray, steps: int, window: int) -> np.ndarray:
    """bool ``[batch, 1, steps, tokens]``: what the op computes, ``attention_mask`` being ``[batch, tokens]``."""
    tokens = attention_mask.shape[1]
    column, row = np.arange(tokens), np.arange(tokens - steps, tokens)[:, None]
    causal = (column <= row) & ((window == NO_WINDOW) | (column > row - window))
    mask: np.ndarray = (attention_mask != 0)[:, None, None] & causal
    return mask


@dataclass(frozen=True)
class Probe:
    """A batch to compare with: ``attention_mask`` is int64 ``[batch, past + steps]``."""

    attention_mask: np.ndarray
    steps: int

    def feeds(self, graph: gs.Graph) -> dict[str, np.ndarray]:
        """Of the inputs of ``graph`` other than the attention mask, only the shapes matter."""
        batch, tokens = self.attention_mask.shape
        sizes = {"batch": batch, "sequence": self.steps, "past": tokens - self.steps}
        others = {
            tensor.name: np.zeros([sizes.get(size, size) for size in tensor.shape], tensor.dtype)
            for tensor in graph.inputs
            if tensor.name != ATTENTION_MASK
        }
        return {ATTENTION_MASK: self.attention_mask, **others}


def _masks(graph: gs.Graph) -> list[gs.Tensor]:
    """Booleans of rank 4 that depend on the attention mask and on sizes alone, and are read by other nodes than such masks."""
    if not {ATTENTION_MASK, TOKENS} <= {tensor.name for tensor in graph.inputs}:
        return []
    of_sizes: set[int] = set()
    of_mask = {id(tensor) for tensor in graph.inputs if tensor.name == ATTENTION_MASK}
    masks: dict[int, gs.Tensor] = {}
    for node in graph.nodes:
        results = {id(tensor) for tensor in node.outputs}
        if node.op == "Shape" and (id(node.inputs[0]) in of_mask or _has_known_sizes(node.inputs[0], graph)):
            of_sizes |= results
        elif node.domain in (None, "") and all(_is_small(tensor) or id(tensor) in of_sizes | of_mask for tensor in node.inputs):
            if not any(id(tensor) in of_mask for tensor in node.inputs):
                of_sizes |= results
                continue
            of_mask |= results
            (result, *_) = node.outputs
            if node.op != "Not" and result.dtype == bool and len(result.shape or ()) == RANK:
                masks[id(result)] = result
    return [mask for mask in masks.values() if any(id(reader.outputs[0]) not in masks for reader in mask.outputs)]


def _is_small(tensor: gs.Tensor) -> bool:
    return tensor.is_empty() or (isinstance(tensor, gs.Constant) and external_proto(tensor) is None)


def _has_known_sizes(tensor: gs.Tensor, graph: gs.Graph) -> bool:
    known = ("batch", "sequence", "past")
    of_graph = any(tensor is graph_input for graph_input in graph.inputs)
    return of_graph and (tensor.name == ATTENTION_MASK or all(isinstance(size, int) or size in known for size in tensor.shape))


def _ancestors(mask: gs.Tensor) -> list[gs.Node]:
    """The nodes that ``mask`` is computed by, up to those that read a shape."""
    nodes: dict[int, gs.Node] = {}
    ahead = [mask]
    while ahead:
        for node in ahead.pop().inputs:
            if id(node) not in nodes:
                nodes[id(node)] = node
                ahead += node.inputs
    return list(nodes.values())


def _leaves(mask: gs.Tensor) -> Iterator[gs.Tensor]:
    """The constants and the graph's inputs that ``mask`` is computed from."""
    tensors = {id(tensor): tensor for node in _ancestors(mask) for tensor in node.inputs}
    return (tensor for tensor in tensors.values() if not tensor.inputs)


def _window(mask: gs.Tensor, graph: gs.Graph) -> int | NearMatch:
    """The window with which the op computes ``mask``."""
    leaves = list(_leaves(mask))
    part = gs.Graph(
        nodes=_ancestors(mask),
        inputs=[tensor for tensor in leaves if isinstance(tensor, gs.Variable) and not tensor.is_empty()],
        outputs=[mask],
        opset=graph.opset,
        ir_version=graph.ir_version,
    )
    longest = max((abs(number) for tensor in leaves for number in numbers(tensor) if abs(number) < LONGEST_WINDOW), default=0)
    try:
        return _window_of(_Compute(part), int(longest))
    except Exception:  # ONNX Runtime's exceptions share no base class
        return NearMatch("it cannot be computed for every batch")


def _window_of(compute: "_Compute", longest: int) -> int | NearMatch:
    (row,) = compute(Probe(np.ones((1, longest + 2), np.int64), 1)).reshape(1, -1)
    window = NO_WINDOW if row.all() else int(row.sum())
    for probe in _probes(window):
        given = compute(probe)
        wanted = computed(probe.attention_mask, probe.steps, window)
        if given.shape != wanted.shape or not np.array_equal(given, wanted):
            return NearMatch("it is another function of the attention mask")
    return window


class _Compute:
    """Runs a graph with one output."""

    def __init__(self, graph: gs.Graph) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        model = gs.export_onnx(graph.toposort()).SerializeToString()
        self._graph = graph
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, probe: Probe) -> np.ndarray:
        (result,) = self._session.run(None, probe.feeds(self._graph))
        return result


def _probes(window: int) -> Iterator[Probe]:
    random = np.random.default_rng(0)
    sizes = list(SIZES)
    if window != NO_WINDOW:
        sizes += [(steps, past) for steps in STEPS for near in AROUND_A_WINDOW if (past := window + near) >= 0]
    for steps, past in sizes:
        tokens = past + steps
        read = np.ones((SEQUENCES, tokens), np.int64)  # the first one is not padded
        read[1, : random.integers(tokens + 1)] = 0  # before its tokens
        read[2, random.integers(tokens + 1) :] = 0  # after them
        read[3] = random.integers(0, 2, tokens)
        yield Probe(read, steps)
        yield Probe(np.zeros((1, tokens), np.int64), steps)
