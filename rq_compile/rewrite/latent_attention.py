"""Pass: attention whose keys and values are computed from cached latents becomes LatentAttention, which attends to the latents.

In multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), the cache holds one latent for each token and one key
with its position, which all heads share. transformers multiplies the latents of all tokens by the matrix ``kv_b_proj`` in each
step, for the keys and values of each head. The op multiplies the new queries by that matrix instead, or, if many tokens are new,
the latents block by block. It appends the new latents to the cache itself.

Requires: products with weight matrices as exported, before ``dense_gemms``. Ensures: attention over latents of the cache that no
other node reads is one op.
"""

import onnx_graphsurgeon as gs

from rq_compile.quantization.formats import DenseFormat
from rq_compile.rewrite.contract import ensures
from rq_compile.rewrite.dense_gemms import DenseWeights, Matrix, matrix_of, matrix_section
from rq_compile.rewrite.experts_to_slots import DOMAIN
from rq_compile.rewrite.match import Pattern, match, numbers
from rq_compile.rewrite.ops import Ops
from rq_compile.rewrite.panels import ROWS
from rq_compile.rewrite.report import Match, NearMatch, PassReport
from rq_compile.rewrite.rotary_embeddings import HEADS, merged_heads
from rq_compile.rewrite.slot_weights import group_of
from rq_compile.rewrite.softmax_attention import appended, by_token, mask_of, read_by_token, scale_of, softmax_attention, unknown
from rq_compile.rewrite.weights import Section, constant

NAME = "latent_attention"
OP = "LatentAttention"
LAST_AXIS_FIRST = {"perm": [3, 1, 2, 0]}
# A tensor with some of its last axis replaced.
WRITTEN: Pattern = (
    *("Transpose", LAST_AXIS_FIRST),
    ("ScatterND", ("Transpose", LAST_AXIS_FIRST, "tensor"), "places", ("Transpose", LAST_AXIS_FIRST, "part")),
)
PLACES: Pattern = ("Unsqueeze", ("Slice", ("Range", "zero", "size", "one"), "start"))
# One key for all heads.
SHARED: Pattern = ("Expand", "position", "heads")
OF_LATENTS: Pattern = (*HEADS[:2], ("Reshape", ("MatMul", "latents", "weight"), "shape"))


def latent_attention(graph: gs.Graph, format: DenseFormat, dense: DenseWeights) -> tuple[list[Section], PassReport]:
    """Rewrite every such attention of ``graph`` in place and return the weights that its nodes refer to, unread.

    Matrices get the formats that ``dense_gemms`` gives them.
    """
    op, report = Ops(graph, NAME), PassReport("latent attentions")
    sections: list[Section] = []
    for node in [node for node in graph.nodes if node.op == "MatMul"]:
        if found := report.matched(_attention(node, graph)):
            sections.append(_fuse(op, found, format, dense))
    graph.cleanup().toposort()
    left = [node for node in graph.nodes if node.op == "MatMul" and isinstance(_attention(node, graph), dict)]
    ensures(NAME, not left, "that no attention over latents is left in parts")
    return sections, report


def _attention(node: gs.Node, graph: gs.Graph) -> Match | NearMatch | None:
    """The tensors of a latent attention whose last product is ``node``, by name; ``product`` is that of the latents."""
    found = softmax_attention(node)
    if not isinstance(found, dict) or (parts := _parts(found["keys"])) is None:
        return None
    nope, shared = parts
    position = match(shared, SHARED)
    split = nope.inputs[0] if nope.inputs and nope.inputs[0].op == "Split" else None
    if position is None or split is None:
        return None
    if [id(part) for part in split.outputs] != [id(nope), id(found["values"])]:
        return NearMatch("its values are not beside its keys")
    expanded = match(split.inputs[0], OF_LATENTS)
    if expanded is None:
        return NearMatch("its keys are not a product of latents")
    for name, cache in (("latents", expanded["latents"]), ("positions", position["position"])):
        extended = appended(cache, graph)
        if extended is None:
            return NearMatch(f"its {name} are not those of a cache of its own")
        found |= {name: cache, f"past_{name}": extended["past"], f"new_{name}": extended["new"]}
    if why := unknown(found) or _other_sizes(found, split, expanded):
        return why
    return {**found, "nope": nope, "product": _product(expanded).outputs[0]}


def _parts(keys: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor] | None:
    """The keys' first part, without position, and the second, if they are written into one tensor."""
    later = match(keys, WRITTEN)
    if later and later["part"].shape[3] == 0:  # the first part is all of it
        return later["tensor"], later["part"]
    earlier = later and match(later["tensor"], WRITTEN)
    if not later or not earlier:
        return None
    starts = [_start(written["places"]) for written in (earlier, later)]
    return (earlier["part"], later["part"]) if starts == [[0], [earlier["part"].shape[3]]] else None


def _start(places: gs.Tensor) -> list[float]:
    found = match(places, PLACES)
    return numbers(found["start"]) if found else []


def _product(expanded: Match) -> gs.Node:
    (node,) = [node for node in expanded["weight"].outputs if node.inputs[0] is expanded["latents"]]
    return node


def _other_sizes(found: Match, split: gs.Node, expanded: Match) -> NearMatch | None:
    """What does not fit in the sizes of an attention."""
    heads, width = found["query"].shape[1], found["query"].shape[3]
    nope, value = (part.shape[3] for part in split.outputs)
    rank, rope = (found[name].shape[3] for name in ("past_latents", "past_positions"))
    if not all(isinstance(size, int) for size in (width, nope, value, rank, rope)) or nope + rope != width:
        return NearMatch(f"its query has {width} columns, its keys {nope} and {rope}")
    matrix = matrix_of(_product(expanded))
    if not isinstance(matrix, Matrix):
        return NearMatch("its latents are not multiplied by a weight matrix")
    if (matrix.rows, matrix.columns) != (heads * (nope + value), rank):
        return NearMatch(f"its matrix has the shape {matrix.rows} x {matrix.columns}")
    if matrix.rows % ROWS:
        return NearMatch(f"its matrix has {matrix.rows} rows, which do not fill panels of {ROWS}")
    return None


def _fuse(op: Ops, found: Match, format: DenseFormat, dense: DenseWeights) -> Section:
    matrix = matrix_of(found["product"].inputs[0])
    assert isinstance(matrix, Matrix)
    kept = "fp32" if format == "fp32" else dense.format_of(matrix, format) or "fp32"
    section = matrix_section(matrix, kept, dense)
    heads, nope, value = found["query"].shape[1], found["nope"].shape[3], found["values"].shape[3]
    operands = [merged_heads(op, by_token(op, found["query"]))]
    operands += [op("Squeeze", found[name], [1]) for name in ("new_latents", "new_positions")]
    operands += [found["past_latents"], found["past_positions"], mask_of(op, found)]
    operands.append(op("Reshape", found["sinks"], [-1]) if "sinks" in found else gs.Variable.empty())
    operands += [constant(weight) for weight in section.weights]
    for cache in (found["latents"], found["positions"]):
        cache.inputs.clear()
    sizes = {"num_heads": heads, "qk_nope_head_dim": nope, "v_head_dim": value, "scale": scale_of(found)}
    y = op(OP, *operands, **sizes, formats=[group_of(kept)], domain=DOMAIN)
    y.inputs[0].outputs += [found["latents"], found["positions"]]
    found["result"].inputs.clear()
    read_by_token(op, found["result"], y, heads, value)
    return section
