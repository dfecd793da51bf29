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
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper

from rq_compile.rewrite.contract import ContractError, requires
from rq_compile.rewrite.moe_layers import OP as MOE_LAYER
from rq_compile.rewrite.weights import LOCATION, external_name
from rq_compile.targets.tensorrt.narrow import Version, Versions, narrowed

NAME = "half_precision"
FLOAT = int(TensorProto.FLOAT)
FLOATS = (FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
SUFFIXES = {FLOAT: "fp32", int(TensorProto.FLOAT16): "fp16", int(TensorProto.BFLOAT16): "bf16"}
REDUCTIONS = ("CumSum", "ReduceL2", "ReduceMean", "ReduceSum")
FUNCTIONS = ("Cos", "Exp", "Log", "Pow", "Range", "Reciprocal", "Sin", "Sqrt")
SENSITIVE = frozenset((*REDUCTIONS, *FUNCTIONS))
ROOTS = frozenset(("Reciprocal", "Sqrt"))
PRODUCTS = frozenset(("MatMul", "Gemm", "Einsum", "DequantizeLinear"))


def router_nodes(model: onnx.ModelProto) -> frozenset[str]:
    """Names of the nodes between what an Experts node is given to compute with and the ids and gates it is given."""
    makers = {output: node for node in model.graph.node for output in node.output}
    names: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "Experts":
            x, *routing = node.input
            names |= _before(routing, makers) - _before([x], makers)
    return frozenset(names)


def half_precision(
    model: onnx.ModelProto, half: np.dtype, *, router: Collection[str] = (), layers: Collection[str] = ()
) -> tuple[onnx.ModelProto, Versions]:
    """The model with ``half`` (fp16 or bf16) where it is enough, and what becomes of its external weights.

    ``router``: see ``router_nodes``; ``layers``: the names of the layers that ``batched_experts`` rewrote.

    Raises:
        ContractError: the model is not as required.
    """
    typed = onnx.shape_inference.infer_shapes(model)
    running = _Pass(half, frozenset(router), tuple(layers))
    running.convert_model(typed.graph)
    try:
        onnx.shape_inference.infer_shapes(typed, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ContractError(f"pass {NAME} promises a well typed graph, but its output breaks that: {error}") from error
    return typed, dict(running.versions)


@dataclass
class _Scope:
    """What a graph sees: ``types`` of the floating values computed so far and the op that made them; float ``constants``;
    ``floats``: what is not constant and was a float before the pass, with the type that it had; ``casts`` made already."""

    types: dict[str, int] = field(default_factory=dict)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    floats: dict[str, int] = field(default_factory=dict)
    makers: dict[str, str] = field(default_factory=dict)
    casts: dict[tuple[str, int], str] = field(default_factory=dict)

    def inside(self, graph: GraphProto) -> "_Scope":
        described = (*graph.value_info, *graph.input, *graph.output)
        elements = {value.name: value.type.tensor_type.elem_type for value in described}
        own = {name: element for name, element in elements.items() if element in FLOATS}
        constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type in FLOATS}
        return _Scope(dict(self.types), self.constants | constants, self.floats | own, dict(self.makers), dict(self.casts))

    def declared(self, name: str) -> int:
        """The type that ``name`` had before the pass."""
        return self.constants[name].data_type if name in self.constants else self.floats[name]


class _Pass:
    def __init__(self, half: np.dtype, router: frozenset[str], layers: tuple[str, ...]) -> None:
        self.half, self.narrow, self.router = half, helper.np_dtype_to_tensor_dtype(half), router
        self.lanes = tuple(f"{layer}.{part}/" for layer in layers for part in ("lanes", "pass"))
        self.sums = tuple(f"{layer}.combine/" for layer in layers)
        self.constants: dict[str, TensorProto] = {}
        self.versions: dict[str, list[Version]] = defaultdict(list)

    def convert_model(self, graph: GraphProto) -> None:
        wanted = {v.name: self.narrow if v.name.startswith("present.") else FLOAT for v in graph.output}
        self._convert_graph(graph, _Scope(), wanted)
        graph.initializer.extend(self.constants.values())

    def _convert_graph(self, graph: GraphProto, outer: _Scope, outputs: dict[str, int]) -> None:
        """Give every node of ``graph`` its type; floating inputs get the narrow one, and ``outputs`` those that are asked for."""
        scope, nodes = outer.inside(graph), list(graph.node)
        requires(NAME, len({node.name for node in nodes}) == len(nodes), "nodes with names")
        for value in graph.input:
            if value.name in scope.floats:
                value.type.tensor_type.elem_type = scope.types[value.name] = self.narrow
        del graph.node[:], graph.value_info[:]
        for node in nodes:
            graph.node.extend(self._converted(node, scope))
        for value in graph.output:
            if value.name in scope.floats:
                value.type.tensor_type.elem_type = outputs[value.name]
                if scope.types[value.name] != outputs[value.name]:
                    _cast_output(graph, value.name, outputs[value.name])
        kept = [tensor for tensor in graph.initializer if tensor.data_type not in FLOATS]
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _converted(self, node: NodeProto, scope: _Scope) -> list[NodeProto]:
        """``node`` with its type, after the casts that it needs; none where it casts a weight, which is then held so."""
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Cast" and node.input[0] in scope.constants:
            scope.constants[node.output[0]] = scope.constants[node.input[0]]
            return []
        bodies = [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]
        for body in bodies:
            self._convert_graph(body, scope, dict.fromkeys((value.name for value in body.output), self.narrow))
        inputs = [name for name in node.input if name in scope.floats or name in scope.constants]
        outputs = [name for name in node.output if name in scope.floats]
        keeps = node.op_type == MOE_LAYER
        element = self.narrow if bodies or keeps else self._element(node, inputs, scope)
        casts: list[NodeProto] = []
        for place, name in enumerate(node.input):
            if name in inputs and node.op_type != "Cast":
                is_scale = node.op_type == "DequantizeLinear" and place == 1
                wanted = scope.declared(name) if keeps else element
                node.input[place] = self._typed(name, wanted, scope, casts, is_scale)
        if node.op_type == "Cast" and outputs:
            attributes["to"].i = element
        for name in outputs:
            scope.types[name], scope.makers[name] = element, node.op_type
        return [*casts, node]

    def _element(self, node: NodeProto, inputs: Sequence[str], scope: _Scope) -> int:
        if node.name in self.router or (node.name.startswith(self.sums) and node.op_type in ("Mul", "ReduceSum")):
            return FLOAT
        if node.op_type in PRODUCTS or node.name.startswith(self.lanes):
            return self.narrow
        if node.op_type in SENSITIVE or (node.op_type in ("Mul", "Div") and any(scope.makers.get(i) in ROOTS for i in inputs)):
            return FLOAT
        if not inputs and node.op_type in ("Cast", "ConstantOfShape"):
            return FLOAT  # of whole numbers, or with its type in an attribute
        computed = [scope.types[name] for name in inputs if name in scope.types]
        return FLOAT if computed and all(element == FLOAT for element in computed) else self.narrow

    def _typed(self, name: str, element: int, scope: _Scope, casts: list[NodeProto], is_scale: bool) -> str:
        """The name of ``name`` in type ``element``."""
        if name in scope.constants:
            return self._constant(scope.constants[name], element, is_scale)
        if scope.types[name] == element:
            return name
        if (name, element) not in scope.casts:
            made = scope.casts[name, element] = f"{name}.{SUFFIXES[element]}"
            casts.append(helper.make_node("Cast", [name], [made], f"{made}.cast", to=element))
        return scope.casts[name, element]

    def _constant(self, tensor: TensorProto, element: int, is_scale: bool) -> str:
        name = tensor.name if element == tensor.data_type else f"{tensor.name}.{SUFFIXES[element]}"
        if name in self.constants:
            return name
        if tensor.data_location == TensorProto.EXTERNAL:
            made = TensorProto(name=name, data_type=element, dims=tensor.dims, data_location=TensorProto.EXTERNAL)
            made.external_data.add(key="location", value=LOCATION)
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(element))
            self.versions[external_name(tensor)].append(Version(name, dtype, is_scale))
        elif element == tensor.data_type:
            made = tensor
        else:
            made = onnx.numpy_helper.from_array(narrowed(onnx.numpy_helper.to_array(tensor), self.half), name)
        self.constants[name] = made
        return name


def _before(names: Sequence[str], makers: dict[str, NodeProto]) -> set[str]:
    """Names of the nodes that ``names`` are computed by."""
    found: set[str] = set()
    open_ = list(names)
    while open_:
        node = makers.get(open_.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            open_ += node.input
    return found


def _cast_output(graph: GraphProto, name: str, element: int) -> None:
    """Let ``name``, an output, be a cast of what it was; who reads it reads what it was."""
    computed = f"{name}.computed"
    _rename(graph, name, computed)
    graph.node.append(helper.make_node("Cast", [computed], [name], f"{name}.cast", to=element))


def _rename(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _rename(attribute.g, old, new)
