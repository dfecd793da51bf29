"""The non-expert modules of a model whose matrices may be quantized: attention, shared experts, dense FFNs, embedding and head.

All matrices of a module share a format. Routers, norms and biases are never quantized, nor are matrices with few rows, such as
the gate of a shared expert.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from rq_compile.architectures.dense_kinds import DenseKind
from rq_compile.architectures.model import Model

# DenseGemm computes 16 rows at a time, and smaller matrices are not worth their scales.
LEAST_ROWS = 16
FFN = re.compile(r"mlp|ffn|feed_forward|shared")


@dataclass(frozen=True)
class DenseModule:
    """Matrices, by the names of their parameters, that share a format.

    ``run``: the submodule whose output shows what a change of the matrices does; it is the module itself, or the MoE block that
    holds shared experts, whose routed ``experts`` are then named. ``layer``: the name of the decoder layer; None for embedding
    and head. ``index``: its number.
    """

    name: str
    kind: DenseKind
    matrices: tuple[str, ...]
    run: str
    layer: str | None = None
    index: int | None = None
    experts: str | None = None


def dense_modules(model: Model) -> tuple[DenseModule, ...]:
    """The modules in the order in which a token passes them; none for an encoder-decoder model."""
    if model.config.is_encoder_decoder:
        return ()
    empty = model.without_weights
    names = {id(module): name for name, module in empty.named_modules()}
    known = set(model.names)
    found = list(_of_layers(model, known))
    ends: tuple[tuple[DenseKind, nn.Module | None], ...]
    ends = ("embedding", empty.get_input_embeddings()), ("head", empty.get_output_embeddings())
    for kind, module in ends:
        matrix = f"{names.get(id(module))}.weight"
        if isinstance(module, nn.Linear | nn.Embedding) and matrix in known:
            found.insert(0 if kind == "embedding" else len(found), _single(names[id(module)], kind, matrix))
    return tuple(found)


def _single(name: str, kind: DenseKind, matrix: str) -> DenseModule:
    return DenseModule(name, kind, (matrix,), name)


def decoder_layer(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.experts``."""
    return re.sub(r"(\.\d+)\..*", r"\1", name)


def _of_layers(model: Model, known: set[str]) -> Iterator[DenseModule]:
    experts = {decoder_layer(layer.name): layer for layer in model.layers}
    stack = re.sub(r"\.\d+$", "", next(iter(experts)))
    for number, module in model.without_weights.get_submodule(stack).named_children():
        layer = f"{stack}.{number}"
        moe = experts.get(layer)
        for child, part in module.named_children():
            path = f"{layer}.{child}"
            routed = moe.name if moe and moe.name.startswith(f"{path}.") else None
            matrices = _matrices(path, part, known, routed, moe.geometry.experts if moe else 0)
            if not matrices:
                continue
            ffn = routed is not None or FFN.search(child)
            kind: DenseKind = "attention" if not ffn else "shared experts" if moe else "dense ffn"
            block = routed.rpartition(".")[0] if routed else path
            # Shared experts may lie outside of the block that routes (Ernie 4.5 VL).
            run = block if all(name.startswith(f"{block}.") for name in matrices) else path
            yield DenseModule(path, kind, matrices, run, layer, int(number), routed)


def _matrices(path: str, module: nn.Module, known: set[str], routed: str | None, experts: int) -> tuple[str, ...]:
    linear = {f"{path}.{below}".removesuffix("."): part for below, part in module.named_modules() if isinstance(part, nn.Linear)}
    # A router is a module of its own with one row for each expert.
    router = "router" in path or (len(linear) == 1 and next(iter(linear.values())).out_features == experts)
    return tuple(
        f"{name}.weight"
        for name, part in linear.items()
        if not router
        and part.out_features >= LEAST_ROWS
        and f"{name}.weight" in known
        and not (routed and (name.startswith(f"{routed}.") or _chooses(name, part, routed, experts)))
    )


def _chooses(name: str, part: nn.Linear, routed: str, experts: int) -> bool:
    """Whether a linear module beside the experts is their router."""
    beside = name.removeprefix(f"{routed.rpartition('.')[0]}.")
    return part.out_features == experts and bool(re.match(r"(gate|router|wg)\b", beside))
