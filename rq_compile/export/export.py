"""A checkpoint's model as an ONNX graph with one Experts node per MoE layer and no weights in it.

The model is traced on the meta device by transformers' ONNX exporter. One graph serves prefill and decode: batch, sequence and
past are free, and the KV cache goes in and out as plain tensors.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from rq_compile.architectures.load import meta_model
from rq_compile.architectures.model import Model
from rq_compile.export.experts_op import route_to_experts_nodes
from rq_compile.export.graph import Parameter, folded, without_weights
from rq_compile.export.rope import free_the_length
from rq_compile.export.switch import route_switch_to_experts_nodes
from rq_compile.targets.manifest import CacheTensor

# Sizes to trace with: all different, and none is 0 or 1, which torch.export would take for constants.
BATCH, SEQUENCE, PAST = 2, 3, 5
OPSET = 21
FREE_AXES: dict[str, dict[int, str]] = {
    "input_ids": {0: "batch", 1: "sequence"},
    "decoder_input_ids": {0: "batch", 1: "decoder_sequence"},
    "attention_mask": {0: "batch", 1: "past_and_sequence"},
    "past_key_values": {2: "past"},
}


@dataclass(frozen=True)
class Exported:
    """``parameters`` are the initializers of ``model`` whose data is left out, by name."""

    model: onnx.ModelProto
    parameters: dict[str, Parameter]
    opset: int
    encoder_decoder: bool
    cache: list[CacheTensor]


def export_graph(model: Model) -> Exported:
    """Export without reading a weight.

    Inputs: ``input_ids`` and ``position_ids`` int64 ``[batch, sequence]``, ``attention_mask`` int64 ``[batch, past + sequence]``,
    ``past_key_values.{i}.key`` and ``.value`` fp32 ``[batch, heads, past, dimension]``; outputs: ``logits`` fp32
    ``[batch, sequence, vocabulary]`` and ``present.{i}.key`` and ``.value``. An encoder-decoder has ``input_ids``,
    ``attention_mask``, ``decoder_input_ids`` and ``logits``, and no cache.

    Raises:
        UserError: see ``meta_model``.
    """
    with _silence():
        module = meta_model(model)
        encoder_decoder = bool(model.config.is_encoder_decoder)
        if encoder_decoder:
            route_switch_to_experts_nodes(module, model.layers)
            inputs, cache = _encoder_decoder_inputs(), list[CacheTensor]()
        else:
            route_to_experts_nodes(module, model.layers)
            free_the_length(module)
            inputs, cache = _causal_inputs(module)
        # Folding constants would read weights that a meta model does not have: `folded` does it, around them.
        config = OnnxConfig(dynamic=True, optimize=False, opset_version=OPSET)
        exported = OnnxExporter().export(module, inputs, config=config).program
        if encoder_decoder:
            _keep_logits(exported.graph)
        _name_inputs_and_outputs(exported.graph)
        exported, parameters = folded(exported, without_weights(exported.graph, module))
    return Exported(onnx_ir.to_proto(exported), parameters, OPSET, encoder_decoder, cache)


def _encoder_decoder_inputs() -> dict[str, Any]:
    ids = torch.zeros(BATCH, PAST, dtype=torch.int64, device="meta")
    decoder_ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": decoder_ids, "use_cache": False}


def _causal_inputs(module: PreTrainedModel) -> tuple[dict[str, Any], list[CacheTensor]]:
    """What to trace with, and the cache's tensors as the model itself shapes them (latent attention has two widths)."""
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64, device="meta")
    held = module(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
    cache, tensors = DynamicCache(), []
    for number, layer in enumerate(held.layers):
        pair = {}
        for kind, shaped in (("key", layer.keys), ("value", layer.values)):
            _, heads, _, dimension = shaped.shape
            pair[kind] = torch.zeros(BATCH, heads, PAST, dimension, device="meta")
            names = (f"past_key_values.{number}.{kind}", f"present.{number}.{kind}")
            tensors.append(CacheTensor(past=names[0], present=names[1], heads=heads, dimension=dimension))
        cache.update(pair["key"], pair["value"], number)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64, device="meta"),
        "position_ids": torch.zeros_like(ids),
        "past_key_values": cache,
    }
    return inputs, tensors


def _keep_logits(graph: onnx_ir.Graph) -> None:
    """Without the encoder's states and the caches of two kinds of attention that no engine takes back in."""
    graph.outputs[:] = [value for value in graph.outputs if value.name == "logits"]


def _name_inputs_and_outputs(graph: onnx_ir.Graph) -> None:
    """Give the cache's tensors and the free dimensions the names that ``export_graph`` promises."""
    for value in (*graph.inputs, *graph.outputs):
        match = re.search(r"layers\.(\d+)\.(key|value)s$", value.name or "")
        if match:
            side = "past_key_values" if value.is_graph_input() else "present"
            value.name = f"{side}.{match[1]}.{match[2]}"
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in FREE_AXES.get((value.name or "").partition(".")[0], {}).items():
            names.setdefault(str(_shape(value)[axis]), name)
    for value in (*graph.inputs, *graph.outputs):
        value.shape = onnx_ir.Shape([_dimension(dimension, names) for dimension in _shape(value)])


def _shape(value: onnx_ir.Value) -> onnx_ir.Shape:
    assert value.shape is not None
    return value.shape


def _dimension(dimension: Any, names: dict[str, str]) -> int | str:
    """A fixed dimension as a number (torch names some of them as symbols, "2"), a free one by its name."""
    text = str(dimension)
    if text.isdigit():
        return int(text)
    return re.sub(r"\w+", lambda symbol: names.get(symbol[0], symbol[0]), text)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """torch's exporter prints its steps and warns of what is no concern of ours."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
