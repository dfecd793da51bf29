"""Exports a checkpoint's model as an ONNX graph with one Experts node per MoE layer and no weights in it.

The model is traced on the meta device by transformers' ONNX exporter. One graph serves prefill and decode: batch, sequence and
past are free dimensions, and the KV cache consists of plain input and output tensors.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx
import onnx_ir
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.exporters import exporter_dynamo, exporter_onnx
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from rq_compile.architectures.load import meta_model
from rq_compile.architectures.model import Model
from rq_compile.architectures.quiet import quiet_transformers
from rq_compile.engine.manifest import CacheTensor
from rq_compile.errors import UserError
from rq_compile.export.experts_op import route_to_experts_nodes
from rq_compile.export.graph import Parameter, folded, without_weights
from rq_compile.export.linear_attention import linear_attention_as_nodes
from rq_compile.export.logits_to_keep import indices_to_trace, take_a_number
from rq_compile.export.rope import free_the_length
from rq_compile.export.switch import route_switch_to_experts_nodes

# Sizes to trace with: all different, and none is 0 or 1, which torch.export would treat as constants.
BATCH, SEQUENCE, PAST, KEPT = 2, 3, 5, 4
OPSET = 21
PAST_NAME, PRESENT_NAME = "past_key_values", "present"
KINDS = {"keys": "key", "values": "value"}
FREE_AXES: dict[str, dict[int, str]] = {
    "input_ids": {0: "batch", 1: "sequence"},
    "decoder_input_ids": {0: "batch", 1: "decoder_sequence"},
    "attention_mask": {0: "batch", 1: "past_and_sequence"},
    "logits_to_keep": {0: "kept"},
    "past_key_values": {2: "past"},
}


@dataclass(frozen=True)
class Exported:
    """``parameters``: the initializers of ``model`` that have no data, by name."""

    model: onnx.ModelProto
    parameters: dict[str, Parameter]
    opset: int
    encoder_decoder: bool
    cache: list[CacheTensor]


def export_graph(model: Model) -> Exported:
    """Export without reading a weight.

    Inputs: ``input_ids`` and ``position_ids`` int64 ``[batch, sequence]``, ``attention_mask`` int64 ``[batch, past + sequence]``,
    ``logits_to_keep`` int64 ``[1]`` (of how many last tokens of each row the logits are computed, 0 for all, 1 if it is not
    given), and the cache's tensors, ``past_key_values.{i}.key`` and ``.value`` fp32 ``[batch, heads, past, dimension]`` among
    them; outputs: ``logits`` fp32 ``[batch, kept, vocabulary]`` and ``present.{i}.key`` and so on. An encoder-decoder has
    ``input_ids``, ``attention_mask``, ``decoder_input_ids`` and ``logits``, and no cache.

    Raises:
        UserError: see ``meta_model``.
    """
    with _quiet_exporters():
        module = meta_model(model)
        encoder_decoder = bool(model.config.is_encoder_decoder)
        if encoder_decoder:
            route_switch_to_experts_nodes(module, model.layers)
            inputs = _encoder_decoder_inputs()
        else:
            route_to_experts_nodes(module, model.layers)
            free_the_length(module)
            inputs = _causal_inputs(module)
        # Folding constants would read weights that a meta model does not have: `folded` does it, around them.
        config = OnnxConfig(dynamic=True, optimize=False, opset_version=OPSET)
        with linear_attention_as_nodes(module):
            exported = OnnxExporter().export(module, inputs, config=config).program
        if encoder_decoder:
            _keep_logits(exported.graph)
        _name_inputs_and_outputs(exported.graph)
        _check_free_dimensions(exported.graph, model)
        cache = _cache_tensors(exported.graph)
        exported, parameters = folded(exported, without_weights(exported.graph, module))
        exported = take_a_number(exported)
    return Exported(onnx_ir.to_proto(exported), parameters, OPSET, encoder_decoder, cache)


def _encoder_decoder_inputs() -> dict[str, Any]:
    ids = torch.zeros(BATCH, PAST, dtype=torch.int64, device="meta")
    decoder_ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": decoder_ids, "use_cache": False}


def _causal_inputs(module: PreTrainedModel) -> dict[str, Any]:
    """What to trace with; the cache holds what the model itself puts there when it has read ``PAST`` tokens."""
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64, device="meta")
    before = torch.zeros(BATCH, PAST, dtype=torch.int64, device="meta")
    with torch.no_grad():
        held: Any = module(input_ids=before, past_key_values=DynamicCache(config=module.config), use_cache=True)
    cache = held.past_key_values
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:  # the whole past goes in, and the mask applies the window
            cache.layers[number] = DynamicLayer()
            cache.layers[number].update(layer.keys, layer.values)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64, device="meta"),
        "position_ids": torch.zeros_like(ids),
        "past_key_values": cache,
        **indices_to_trace(module, KEPT),
    }


def _check_free_dimensions(graph: onnx_ir.Graph, model: Model) -> None:
    """
    Raises:
        UserError: tracing fixed the batch, the sequence or the past to the sizes it was traced with.
    """
    for value in graph.inputs:
        axes = (0,) if len(_shape(value)) == 1 or (value.name or "").startswith(f"{PAST_NAME}.") else (0, 1)
        if any(str(_shape(value)[axis]).isdigit() for axis in axes):
            raise UserError(
                f"{model.path}: layers of {model.model_type} loop over the batch or the sequence in Python, which fixes "
                f"{value.name} to the sizes that it was traced with; use another family, no engine can be made of this one"
            )


def _cache_tensors(graph: onnx_ir.Graph) -> list[CacheTensor]:
    """The cache's tensors in a graph whose inputs and outputs have been named.

    Raises:
        UserError: the graph does not return or does not read a tensor of the cache.
    """
    outputs = {value.name for value in graph.outputs}
    tensors = []
    for value in graph.inputs:
        name = value.name or ""
        if name.startswith(f"{PAST_NAME}."):
            present = name.replace(PAST_NAME, PRESENT_NAME, 1)
            if present not in outputs or not value.uses():
                missing = "give back" if value.uses() else "read"
                raise UserError(
                    f"the exported graph does not {missing} the cache tensor {name}, so it cannot decode; use another family"
                )
            shape = [int(text) if (text := str(dimension)).isdigit() else text for dimension in _shape(value)]
            tensors.append(CacheTensor.model_validate({"past": name, "present": present, "shape": shape}))
    return tensors


def _keep_logits(graph: onnx_ir.Graph) -> None:
    """Keep only the logits. The other outputs, the encoder's states and the caches of two kinds of attention, are never
    inputs."""
    graph.outputs[:] = [value for value in graph.outputs if value.name == "logits"]


def _name_inputs_and_outputs(graph: onnx_ir.Graph) -> None:
    """Give the cache's tensors and the free dimensions the names documented in ``export_graph``."""
    for value in (*graph.inputs, *graph.outputs):
        match = re.search(r"layers\.(\d+)\.([\w.]+)$", value.name or "")
        if match:
            side = PAST_NAME if value.is_graph_input() else PRESENT_NAME
            value.name = f"{side}.{match[1]}.{KINDS.get(match[2], match[2])}"
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in FREE_AXES.get((value.name or "").partition(".")[0], {}).items():
            if axis < len(_shape(value)) and not str(_shape(value)[axis]).isdigit():
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


@contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Silence both exporters. torch's prints its steps unless it is told not to, which transformers' cannot pass on. Their log
    messages and warnings (about their own deprecated calls, or ops of packages not installed) do not concern the user."""
    export = torch.onnx.export
    levels = {log: log.level for log in (exporter_dynamo.logger, exporter_onnx.logger, logging.getLogger("torch"))}
    with quiet_transformers():
        torch.onnx.export = partial(export, verbose=False)
        for log in levels:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            torch.onnx.export = export
            for log, level in levels.items():
                log.setLevel(level)
