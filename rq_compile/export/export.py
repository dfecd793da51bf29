"""Exports a checkpoint's model as an ONNX graph with one Experts node per MoE layer and no weights in it.

The model is traced on the meta device by transformers' ONNX exporter. One graph serves prefill and decode: batch, sequence and
past are free dimensions, and the KV cache consists of plain input and output tensors.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import onnx
import onnx_ir
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.exporters import exporter_dynamo, exporter_onnx
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from rq_compile.architectures.caches import empty_cache
from rq_compile.architectures.load import meta_model
from rq_compile.architectures.model import Model
from rq_compile.architectures.quiet import quiet_transformers
from rq_compile.engine.manifest import CacheTensor
from rq_compile.errors import UserError, reason
from rq_compile.export.experts_op import route_to_experts_nodes
from rq_compile.export.exported import Exported
from rq_compile.export.graph import folded, without_weights
from rq_compile.export.logits_to_keep import indices_to_trace, take_a_number
from rq_compile.export.recurrent_layers import recurrent_layers_as_nodes
from rq_compile.export.rope import free_the_length
from rq_compile.export.sparse_attention import keep_every_group
from rq_compile.export.switch import route_switch_to_experts_nodes

# Sizes to trace with: all different, and none is 0 or 1, which torch.export would treat as constants.
BATCH, SEQUENCE, PAST, KEPT = 2, 3, 5, 4
# Keys of a config that state how many tokens sparse attention groups; the past must contain some groups.
GROUPS = ("index_kpool",)
WITHOUT_WINDOW = {
    DynamicSlidingWindowLayer: DynamicLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: LinearAttentionAndFullAttentionLayer,
}
OPSET = 21
PAST_NAME, PRESENT_NAME = "past_key_values", "present"
# A cache keeps a layer's tensors in an object for the layer, or in a list with one tensor per layer.
CACHE_NAME = re.compile(r"(layers|(?P<list>\w+_cache))\.(?P<layer>\d+)(\.(?P<kind>[\w.]+))?$")
KINDS = {"keys": "key", "values": "value"}
FREE_AXES: dict[str, dict[int, str]] = {
    "input_ids": {0: "batch", 1: "sequence"},
    "decoder_input_ids": {0: "batch", 1: "decoder_sequence"},
    "attention_mask": {0: "batch", 1: "past_and_sequence"},
    "logits_to_keep": {0: "kept"},
    "past_key_values": {2: "past"},
    "indexer_keys": {1: "past"},
}


def export_graph(model: Model) -> Exported:
    """Export without reading a weight.

    Inputs: ``input_ids`` and ``position_ids`` int64 ``[batch, sequence]``, ``attention_mask`` int64 ``[batch, past + sequence]``,
    ``logits_to_keep`` int64 ``[1]`` (the number of last tokens of each row for which logits are computed; 0: all; default 1),
    and the cache's tensors, such as ``past_key_values.{i}.key`` and ``.value`` fp32 ``[batch, heads, past, dimension]``.
    Outputs: ``logits`` fp32 ``[batch, kept, vocabulary]``, ``present.{i}.key`` and so on. An encoder-decoder has
    ``input_ids``, ``attention_mask``, ``decoder_input_ids`` and ``logits``, and no cache.

    Raises:
        UserError: the model cannot be traced, or not with a free length, or the shapes of its graph contradict each other.
    """
    with _quiet_exporters():
        module = meta_model(model)
        encoder_decoder = bool(model.config.is_encoder_decoder)
        try:
            exported = _traced(module, model)
        except UserError:
            raise
        except Exception as error:  # running, tracing and translating a forward can fail in any way
            raise UserError(
                f"{model.path}: {model.model_type} cannot be traced into a graph ({reason(_innermost(error))[:200]}); "
                "use another family, no engine can be made of this one"
            ) from error
        if encoder_decoder:
            _keep_logits(exported.graph)
        _name_inputs_and_outputs(exported.graph)
        _check_free_dimensions(exported.graph, model)
        cache = _cache_tensors(exported.graph)
        exported, parameters = folded(exported, without_weights(exported.graph, module))
        exported = take_a_number(exported)
        graph = onnx_ir.to_proto(exported)
        _check_shapes(graph, model)
    return Exported(graph, parameters, OPSET, encoder_decoder, cache)


def _traced(module: PreTrainedModel, model: Model) -> onnx_ir.Model:
    if model.config.is_encoder_decoder:
        route_switch_to_experts_nodes(module, model.layers)
        inputs = _encoder_decoder_inputs()
    else:
        route_to_experts_nodes(module, model.layers)
        free_the_length(module)
        keep_every_group(module)
        inputs = _causal_inputs(module, model)
    # Folding constants here would read weights, which a meta model does not have. `folded` folds the constants around them.
    config = OnnxConfig(dynamic=True, optimize=False, opset_version=OPSET)
    with recurrent_layers_as_nodes(module):
        return OnnxExporter().export(module, inputs, config=config).program


def _check_shapes(graph: onnx.ModelProto, model: Model) -> None:
    """
    Raises:
        UserError: shapes contradict each other. ONNX Runtime would refuse such a graph, but only after the whole compilation.
    """
    try:
        onnx.shape_inference.infer_shapes(graph, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise UserError(
            f"{model.path}: {model.model_type} gives a graph whose shapes contradict each other ({reason(error)[:200]}); "
            "use another family, no engine can be made of this one"
        ) from error


def _innermost(error: BaseException) -> BaseException:
    """The error at the end of the chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _encoder_decoder_inputs() -> dict[str, Any]:
    ids = torch.zeros(BATCH, PAST, dtype=torch.int64, device="meta")
    decoder_ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": decoder_ids, "use_cache": False}


def _causal_inputs(module: PreTrainedModel, model: Model) -> dict[str, Any]:
    """What to trace with. The cache contains what the model itself writes to it after some tokens.

    Raises:
        UserError: the cache forgets tokens in a way that is not a sliding window.
    """
    groups = 2 * _longest_group(module)
    ids, before = (torch.zeros(BATCH, size + groups, dtype=torch.int64, device="meta") for size in (SEQUENCE, PAST))
    with torch.no_grad():
        held: Any = module(input_ids=before, past_key_values=empty_cache(module), use_cache=True)
    cache = held.past_key_values
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and not layer.is_initialized:  # its states are in another list
            cache.layers[number] = LinearAttentionLayer()
        elif isinstance(layer, DynamicSlidingWindowLayer):
            if type(layer) not in WITHOUT_WINDOW:
                raise UserError(
                    f"{model.path}: attention of {model.model_type} forgets tokens in a way of its own ({type(layer).__name__}), "
                    "which an engine cannot; use another family, no engine can be made of this one"
                )
            _forget_nothing(layer, before.shape[1])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(BATCH, ids.shape[1] + before.shape[1], dtype=torch.int64, device="meta"),
        "position_ids": torch.zeros_like(ids),
        "past_key_values": cache,
        **indices_to_trace(module, KEPT),
    }


def _forget_nothing(layer: Any, tokens: int) -> None:
    """Turn a cache layer with a sliding window, on the meta device, into one that keeps all ``tokens``; masks do the rest."""
    for part in ("keys", "values"):
        batch, heads, _, size = getattr(layer, part).shape
        setattr(layer, part, torch.empty(batch, heads, tokens, size, device="meta"))
    layer.__class__ = WITHOUT_WINDOW[type(layer)]
    for name in vars(layer).keys() - vars(type(layer)()).keys() - {"dtype", "device"}:
        delattr(layer, name)  # of the window


def _longest_group(module: PreTrainedModel) -> int:
    """The most tokens that sparse attention groups; 0 if it does not group tokens."""
    config = module.config.get_text_config()
    return max(getattr(config, key, None) or 0 for key in GROUPS)


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
        match = CACHE_NAME.search(value.name or "")
        if match:
            side, kind = PAST_NAME if value.is_graph_input() else PRESENT_NAME, match["kind"] or match["list"]
            value.name = f"{side}.{match['layer']}.{KINDS.get(kind, kind)}"
    names: dict[str, str] = {}
    for value in graph.inputs:
        whole = value.name or ""
        first, last = whole.partition(".")[0], whole.rpartition(".")[2]
        for axis, name in (FREE_AXES.get(first, {}) | FREE_AXES.get(last, {})).items():
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
