"""Latent attention with the sizes of DeepSeek-V2-Lite: LatentAttention beside the ops as which transformers' is exported.

The graph of a model of one layer is exported and rewritten with and without the pass ``latent_attention``. From both, the part
between query, new latents and output projection is cut out: the rows are of attention alone, with ``kv_b_proj`` in bf16. "before"
computes the keys and values of all tokens in each step and returns another cache; "after" appends to the cache in place. Times
are medians; the two take turns.

    python benchmarks/latent_attention.py -o benchmarks/results/latent_attention.json
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from cache_attention import Contender, Step, microseconds, numbers
from provenance import write_rows
from transformers import AutoConfig, AutoModelForCausalLM

from rq_compile.architectures.model import Model
from rq_compile.export.export import export_graph
from rq_compile.export.exported import Exported
from rq_compile.rewrite.dense_gemms import DenseWeights, dense_gemms
from rq_compile.rewrite.latent_attention import latent_attention
from rq_compile.rewrite.rewrite import exported, imported
from rq_compile.rewrite.softmax_attention import appended, softmax_attention
from rq_compile.rewrite.weights import Section, stored

HEADS, RANK, ROPE, NOPE, VALUE = 16, 512, 64, 128, 128
CONFIG = {
    **{"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "kv_lora_rank": RANK, "q_lora_rank": None},
    **{"qk_rope_head_dim": ROPE, "qk_nope_head_dim": NOPE, "v_head_dim": VALUE, "head_dim": ROPE},
    **{"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 128, "num_hidden_layers": 1},
    **{
        "first_k_dense_replace": 0,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "topk_method": "greedy",
    },
}
DECODE = [Step(batch, past, 1) for batch in (1, 8) for past in (100, 1000, 8000)]
MOST = 20_000  # tokens of a step for which all keys and values are computed: more take gigabytes, and tens of seconds
PREFILL = [Step(1, 0, 128), Step(1, 0, 1024), Step(1, 0, 4096), Step(1, 1000, 32), Step(1, 1000, 128), Step(1, 4096, 512)]


@dataclass(frozen=True)
class Shape:
    name: str = "DeepSeek-V2-Lite"


class Layer:
    """The exported layer, and the names of the tensors around its attention."""

    def __init__(self, folder: Path) -> None:
        config: Any = AutoConfig.for_model("deepseek_v2", **CONFIG)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        self._model = Model.open(folder)
        self._exported: Exported = export_graph(self._model)
        graph = imported(self._exported.model)
        (found,) = [f for node in graph.nodes if node.op == "MatMul" and isinstance(f := softmax_attention(node), dict)]
        merged = found["result"].outputs[0].outputs[0].outputs[0].outputs[0]
        self._inputs = {found["query"].name: "query", found["allowed"].name: "mask"}
        self._outputs = {merged.name: "y"}
        caches = [cache for cache in graph.outputs if appended(cache, graph)]
        for cache, name in zip(caches, ("latent", "position"), strict=True):
            parts = appended(cache, graph)
            assert parts is not None
            self._inputs |= {parts["past"].name: f"past_{name}", parts["new"].name: name}
            self._outputs[cache.name] = f"present_{name}"

    def graph(self, *, fused: bool) -> onnx.ModelProto:
        """Attention as a graph of its own, with its weights."""
        graph, parameters = imported(self._exported.model), self._exported.parameters
        dense = DenseWeights(
            lambda name: self._model.dtype_of(parameters[name].name), lambda name: parameters[name].read(self._model)
        )
        sections = latent_attention(graph, "stored", dense)[0] if fused else []
        sections = sections + dense_gemms(graph, "stored", dense)[0]
        tensors = graph.tensors()
        shapes = [tensor for tensor in graph.inputs if tensor.name in ("input_ids", "position_ids")]
        graph.inputs = [*(_renamed(tensors[old], new) for old, new in self._inputs.items()), *shapes]
        for tensor in graph.inputs[: len(self._inputs)]:
            tensor.inputs.clear()
        graph.outputs = [_renamed(tensors[old], new) for old, new in self._outputs.items()]
        for tensor in graph.outputs:
            tensor.dtype = np.float32
        graph.cleanup(remove_unused_graph_inputs=True).toposort()
        return _with_weights(exported(graph), sections)


def _renamed(tensor: gs.Tensor, name: str) -> gs.Tensor:
    tensor.name = name
    return tensor


def _with_weights(model: onnx.ModelProto, sections: list[Section]) -> onnx.ModelProto:
    external = {t.name: t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    for piece in [piece for section in sections for piece in section.pieces if piece.weights[0].name in external]:
        for weight, values in zip(piece.weights, piece.values(), strict=True):
            tensor = external[weight.name]
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = stored(values, weight.dtype).tobytes()
    return model


class Inputs:
    """What the graphs read in one step."""

    shape = Shape()

    def __init__(self, step: Step) -> None:
        self.step, self.total = step, step.past + step.tokens
        rows = np.arange(step.past, self.total)[:, None]
        ids = np.zeros((step.batch, step.tokens), np.int64)
        self._fresh = {
            "query": numbers(step.batch, HEADS, step.tokens, NOPE + ROPE),
            "latent": numbers(step.batch, 1, step.tokens, RANK),
            "position": numbers(step.batch, 1, step.tokens, ROPE),
            "mask": np.broadcast_to(np.arange(self.total) <= rows, (step.batch, 1, step.tokens, self.total)).copy(),
            "input_ids": ids,
            "position_ids": ids,
        }

    def feeds(self, model: onnx.ModelProto, columns: int) -> dict[str, np.ndarray]:
        """For the inputs of ``model``, with caches that have room for ``columns``."""
        feeds = dict(self._fresh)
        for name, width in (("latent", RANK), ("position", ROPE)):
            feeds[f"past_{name}"] = np.zeros((self.step.batch, 1, columns, width), np.float32)
            feeds[f"past_{name}"][:, :, : self.step.past] = numbers(self.step.batch, 1, self.step.past, width)
        return {tensor.name: feeds[tensor.name] for tensor in model.graph.input}


def contender(inputs: Inputs, threads: int, model: onnx.ModelProto, in_place: bool) -> Contender:
    feeds = inputs.feeds(model, inputs.total if in_place else inputs.step.past)
    return Contender(model, feeds, threads, in_place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--steps", nargs="+", help="those whose names contain one of these texts, such as 'decode'")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each graph in a cell")
    parser.add_argument("-o", "--output", type=Path, help="file for the rows, JSON")
    arguments = parser.parse_args()
    steps = [step for step in DECODE + PREFILL if any(word in str(step) for word in arguments.steps or [""])]
    with tempfile.TemporaryDirectory() as folder:
        layer = Layer(Path(folder) / "model")
        graphs = {name: layer.graph(fused=name == "after") for name in ("before", "after")}
    makers = {name: partial(contender, model=graph, in_place=name == "after") for name, graph in graphs.items()}
    rows = []
    for threads in arguments.threads:
        for step in steps:
            compared = makers if step.batch * (step.past + step.tokens) <= MOST else {"after": makers["after"]}
            times = microseconds(compared, Inputs(step), threads, arguments.seconds)
            times = {name: round(value, 1) for name, value in times.items()}
            row: dict[str, Any] = {"shape": Shape().name, "step": str(step), "threads": threads, "microseconds": times}
            if "before" in times:
                row["times_faster"] = round(times["before"] / times["after"], 2)
            rows.append(row)
            print(f"{row['step']}, {threads} threads: {times} us; {row.get('times_faster', '?')} times faster", flush=True)
    if arguments.output:
        write_rows(arguments.output, rows)


if __name__ == "__main__":
    main()
