"""Pass: the graph in 16 bits with all types explicit, as a strongly typed network requires.

The following stay in fp32: (1) the router, from its product to the gates; (2) the reductions of norms and the values combined
with them, rotary angles and other functions that would lose too much in 16 bits; (3) the sum over a token's experts; (4) the
graph's outputs, except the cache. Products and the experts' lanes are in 16 bits; a MoeLayer keeps its types. Any other node
computes in fp32 if all its operands are fp32, so that the scale and the rotation after a norm still do, else in 16 bits.

Requires: nodes sorted by dependence, names unique over all subgraphs; all floats are fp32, except weights that are cast to fp32,
and the inputs and outputs of MoeLayer nodes, which are in the same 16-bit type between casts.
Ensures: the graph is well typed; its floating inputs and its ``present`` outputs are in 16 bits; a weight is stored in the type
that it is used in.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx.helper import np_dtype_to_tensor_dtype, tensor_dtype_to_np_dtype
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from rq_compile.rewrite.contract import ContractError, requires
from rq_compile.rewrite.moe_layers import OP as MOE_LAYER
from rq_compile.rewrite.report import PassReport
from rq_compile.rewrite.rewrite import exported, imported
from rq_compile.rewrite.weights import ExternalWeight, constant, external_name, external_proto
from rq_compile.targets.tensorrt.narrow import Version, Versions, narrowed

NAME = "half_precision"
FLOAT = int(TensorProto.FLOAT)
SUFFIXES = {FLOAT: "fp32", int(TensorProto.FLOAT16): "fp16", int(TensorProto.BFLOAT16): "bf16"}
REDUCTIONS = ("CumSum", "ReduceL2", "ReduceMean", "ReduceSum")
FUNCTIONS = ("Cos", "Exp", "Log", "Pow", "Range", "Reciprocal", "Sin", "Sqrt")
SENSITIVE = frozenset((*REDUCTIONS, *FUNCTIONS))
ROOTS = frozenset(("Reciprocal", "Sqrt"))
PRODUCTS = frozenset(("MatMul", "Gemm", "Einsum", "DequantizeLinear"))


def router_nodes(graph: gs.Graph) -> frozenset[str]:
    """Names of the nodes between what an Experts node is given to compute with and the ids and gates it is given."""
    names: set[str] = set()
    for node in graph.nodes:
        if node.op == "Experts":
            x, *routing = node.inputs
            names |= _before(routing) - _before([x])
    return frozenset(names)


def half_precision(
    model: onnx.ModelProto, half: np.dtype, *, router: Collection[str] = (), layers: Collection[str] = ()
) -> tuple[onnx.ModelProto, Versions, PassReport]:
    """The model with ``half`` (fp16 or bf16) where it is enough, and what becomes of its external weights.

    ``router``: see ``router_nodes``; ``layers``: the names of the layers that ``batched_experts`` rewrote.

    Raises:
        ContractError: the model is not as required.
    """
    graph = imported(onnx.shape_inference.infer_shapes(model))
    running = _Pass(half, frozenset(router), tuple(layers))
    running.convert(graph)
    typed = exported(graph)
    try:
        onnx.shape_inference.infer_shapes(typed, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ContractError(f"pass {NAME} promises a well typed graph, but its output breaks that: {error}") from error
    return typed, dict(running.versions), running.report


# The casts available in a graph, by the name of the cast tensor and the type.
_Casts = dict[tuple[str, int], gs.Variable]


class _Pass:
    """``types``: the types of the floating values computed so far; ``held``: the constants that replace their casts;
    ``constants``: the converted constants, by their new names. A variable's ``dtype`` is not changed before the end."""

    def __init__(self, half: np.dtype, router: frozenset[str], layers: tuple[str, ...]) -> None:
        self.half, self.narrow, self.router = half, np_dtype_to_tensor_dtype(half), router
        self.lanes = tuple(f"{layer}.{part}/" for layer in layers for part in ("lanes", "pass"))
        self.sums = tuple(f"{layer}.combine/" for layer in layers)
        self.types: dict[str, int] = {}
        self.held: dict[str, gs.Constant] = {}
        self.constants: dict[str, gs.Constant] = {}
        self.versions: dict[str, list[Version]] = defaultdict(list)
        self.report = PassReport("nodes", "in 16 bit")

    def convert(self, graph: gs.Graph) -> None:
        wanted = {tensor.name: self.narrow if tensor.name.startswith("present.") else FLOAT for tensor in graph.outputs}
        self._convert(graph, {}, wanted)
        bodies = list(graph.subgraphs(recursive=True))
        _forget_types([graph, *bodies])
        known = graph.tensors()
        for body in bodies:
            _refer_to_outer_constants(body, known)

    def _convert(self, graph: gs.Graph, outer: _Casts, outputs: dict[str, int]) -> None:
        """Give every node of ``graph`` its type. Floating-point inputs get the narrow type, and outputs the types in
        ``outputs``."""
        casts, nodes = dict(outer), list(graph.nodes)
        requires(NAME, len({node.name for node in nodes}) == len(nodes), "nodes with names")
        self.types |= {tensor.name: self.narrow for tensor in graph.inputs if _is_float(tensor)}
        graph.nodes = []
        for node in nodes:
            graph.nodes.extend(self._converted(node, casts))
        for tensor in [tensor for tensor in graph.outputs if _is_float(tensor)]:
            if self.types[tensor.name] != outputs[tensor.name]:
                graph.nodes.append(_cast_of_output(tensor, outputs[tensor.name]))
                self.types[tensor.name] = outputs[tensor.name]
        for tensor in filter(_is_float, (*graph.inputs, *graph.outputs)):
            tensor.dtype = self.types[tensor.name]

    def _converted(self, node: gs.Node, casts: _Casts) -> list[gs.Node]:
        """``node`` with its type, after the casts that it needs; none where it casts a weight, which is then held so."""
        if node.op == "Cast" and (weight := self._constant_of(node.inputs[0])) is not None:
            self.held[node.outputs[0].name] = weight
            return []
        bodies = list(node.subgraphs())
        for body in bodies:
            self._convert(body, casts, dict.fromkeys((tensor.name for tensor in body.outputs), self.narrow))
        inputs = [tensor for tensor in node.inputs if _is_float(tensor)]
        outputs = [tensor for tensor in node.outputs if _is_float(tensor)]
        keeps = node.op == MOE_LAYER
        why = None if bodies or keeps else self._why_wide(node, inputs)
        element = FLOAT if why else self.narrow
        added: list[gs.Node] = []
        for place, tensor in enumerate(node.inputs):
            if _is_float(tensor) and node.op != "Cast":
                is_scale = node.op == "DequantizeLinear" and place == 1
                wanted = _element(self._constant_of(tensor) or tensor) if keeps else element
                node.inputs[place] = self._typed(tensor, wanted, casts, added, is_scale)
        if outputs:
            if node.op == "Cast":
                node.attrs["to"] = element
            self.types |= {tensor.name: element for tensor in outputs}
            if why:
                self.report.leave(why)
            else:
                self.report.changed += 1
        return [*added, node]

    def _why_wide(self, node: gs.Node, inputs: Sequence[gs.Tensor]) -> str | None:
        """Why ``node`` has to compute in fp32, or None."""
        if node.name in self.router:
            return "they choose experts"
        if node.name.startswith(self.sums) and node.op in ("Mul", "ReduceSum"):
            return "they sum over experts"
        if node.op in PRODUCTS or node.name.startswith(self.lanes):
            return None
        if node.op in SENSITIVE:
            return node.op
        if node.op in ("Mul", "Div") and any(maker.op in ROOTS for tensor in inputs for maker in tensor.inputs):
            return "they scale by a root"
        if not inputs and node.op in ("Cast", "ConstantOfShape"):
            return "they are made of whole numbers"  # or with their type in an attribute
        computed = [self.types[tensor.name] for tensor in inputs if tensor.name in self.types]
        return "all operands are fp32" if computed and all(element == FLOAT for element in computed) else None

    def _constant_of(self, tensor: gs.Tensor) -> gs.Constant | None:
        """The floating-point constant that ``tensor`` is, or that it is a cast of."""
        if isinstance(tensor, gs.Constant):
            return tensor if _is_float(tensor) else None
        return self.held.get(tensor.name)

    def _typed(self, tensor: gs.Tensor, element: int, casts: _Casts, added: list[gs.Node], is_scale: bool) -> gs.Tensor:
        """``tensor`` in type ``element``."""
        if (weight := self._constant_of(tensor)) is not None:
            return self._constant(weight, element, is_scale)
        if self.types[tensor.name] == element:
            return tensor
        if (tensor.name, element) not in casts:
            made = casts[tensor.name, element] = gs.Variable(f"{tensor.name}.{SUFFIXES[element]}")
            added.append(gs.Node("Cast", f"{made.name}.cast", {"to": element}, [tensor], [made]))
        return casts[tensor.name, element]

    def _constant(self, tensor: gs.Constant, element: int, is_scale: bool) -> gs.Constant:
        name = tensor.name if element == _element(tensor) else f"{tensor.name}.{SUFFIXES[element]}"
        if name not in self.constants:
            proto = external_proto(tensor)
            if proto is not None:
                dtype = np.dtype(tensor_dtype_to_np_dtype(element))
                self.versions[external_name(proto)].append(Version(name, dtype, is_scale))
                self.constants[name] = constant(ExternalWeight(name, dtype, tuple(proto.dims)))
            elif element == _element(tensor):
                self.constants[name] = tensor
            else:
                self.constants[name] = gs.Constant(name, narrowed(tensor.values, self.half))
        return self.constants[name]


def _element(tensor: gs.Tensor) -> int:
    """ONNX's number for the tensor's type; 0 if it is not known."""
    return 0 if tensor.dtype is None else int(dtype_to_onnx(tensor.dtype))


def _is_float(tensor: gs.Tensor) -> bool:
    return _element(tensor) in SUFFIXES


def _before(tensors: Iterable[gs.Tensor]) -> set[str]:
    """Names of the nodes that compute ``tensors``."""
    found: set[str] = set()
    pending = list(tensors)
    while pending:
        for node in pending.pop().inputs:
            if node.name not in found:
                found.add(node.name)
                pending += node.inputs
    return found


def _cast_of_output(tensor: gs.Variable, element: int) -> gs.Node:
    """A node that makes ``tensor`` a cast of its previous value; the nodes that read it get the previous value."""
    computed = gs.Variable(f"{tensor.name}.computed")
    (maker,) = tensor.inputs
    maker.outputs = [computed if output is tensor else output for output in maker.outputs]
    for node in list(tensor.outputs):
        node.inputs = [computed if given is tensor else given for given in node.inputs]
    return gs.Node("Cast", f"{tensor.name}.cast", {"to": element}, [computed], [tensor])


def _forget_types(graphs: Sequence[gs.Graph]) -> None:
    """Remove the shapes and types of all tensors except inputs and outputs: they were inferred before the pass."""
    kept = {id(tensor) for graph in graphs for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in (tensor for graph in graphs for tensor in graph.tensors().values()):
        if isinstance(tensor, gs.Variable) and id(tensor) not in kept:
            tensor.dtype = tensor.shape = None


def _refer_to_outer_constants(body: gs.Graph, outer: Collection[str]) -> None:
    """Without this, graph surgeon would write constants of the outer graph that ``body`` reads into the body as well."""
    for node in body.nodes:
        node.inputs = [
            gs.Variable(tensor.name) if isinstance(tensor, gs.Constant) and tensor.name in outer else tensor
            for tensor in node.inputs
        ]
