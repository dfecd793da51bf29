"""One MoE layer in every implementation that the benchmark compares: ours, ONNX Runtime's own, torch's, llama.cpp's."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from llama_cpp_layer import LlamaCppLayer, blocks
from onnx import TensorProto, helper

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.architectures.layers import ExpertWeights
from rq_compile.engine.library import library_path
from rq_compile.lowerings import LOWERINGS, with_options
from rq_compile.planning.schema import LayerPlan, LayerPrediction, Plan, Slot
from rq_compile.quantization.formats import BLOCKS, MXFP4, SLOT_FORMATS, Block, Format, block_size
from rq_compile.quantization.packing import Quantized
from rq_compile.quantization.quantizer import quantize
from rq_compile.quantization.second_moment import SecondMoment
from rq_compile.quantization.source_numbers import SourceNumbers
from rq_compile.rewrite import slot_weights
from rq_compile.targets.partial_file import WRITTEN_AT_ONCE
from rq_compile.targets.weights_file import locate, write_weights

LAYER = "layer"
BLOCK = BLOCKS[0]
# Formats that only hold what a checkpoint stores in the same way.
CARRIED = [name for name, format in SLOT_FORMATS.items() if format.only_carried]


class Batch(NamedTuple):
    """fp32 ``x [T, H]``, int64 ``ids [T, k]``, fp32 ``gates [T, k]``, and ``logits [T, E]`` of a router that gives them."""

    x: np.ndarray
    ids: np.ndarray
    gates: np.ndarray
    logits: np.ndarray


Run = Callable[[Batch], np.ndarray]


@dataclass(frozen=True)
class Shape:
    """A SwiGLU MoE layer of some model."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def geometry(self) -> ExpertGeometry:
        return ExpertGeometry(
            experts=self.experts, top_k=self.top_k, hidden=self.hidden, intermediate=self.intermediate, activation="swiglu"
        )


def formats_of(shape: Shape, format: str) -> list[Format]:
    """The format of each expert; "mixed": of eight experts, one is fp16, two int8, five int4."""
    if format != "mixed":
        return [format] * shape.experts  # type: ignore[list-item]
    return [("fp16", "int8", "int8", "int4", "int4", "int4", "int4", "int4")[e % 8] for e in range(shape.experts)]


class Experts:
    """Random experts as views of two matrices; each view starts one row after the previous one.

    So no two experts have the same bytes (ONNX Runtime shares equal prepacked weights), and all together take little more memory
    than one.
    """

    def __init__(self, shape: Shape) -> None:
        random = np.random.default_rng(0)

        def matrix(rows: int, columns: int) -> np.ndarray:
            return (random.standard_normal((rows + shape.experts, columns), np.float32) / np.sqrt(columns)).astype(np.float32)

        up, down = 2 * shape.intermediate, shape.hidden
        self._bases = (matrix(up, shape.hidden), matrix(down, shape.intermediate))
        self._quantized: dict[tuple[int, Format, Block], Quantized] = {}
        self._ranges = [(slice(e, e + up), slice(e, e + down)) for e in range(shape.experts)]
        self.all = [ExpertWeights(self._bases[0][rows], self._bases[1][columns]) for rows, columns in self._ranges]

    def carried(self, format: Format) -> list[ExpertWeights]:
        """The experts as a checkpoint stores them in ``format``, to which nothing is rounded."""
        up, down = (carried_numbers(base, format) for base in self._bases)
        values = [held.numbers.astype(np.float32) * held.scales[0, 0] for held in (up, down)]
        return [
            ExpertWeights(
                values[0][rows],
                values[1][columns],
                up_numbers=replace(up, numbers=up.numbers[rows], scales=up.scales[rows]),
                down_numbers=replace(down, numbers=down.numbers[columns], scales=down.scales[columns]),
            )
            for rows, columns in self._ranges
        ]

    def quantized(self, weights: np.ndarray, format: Format, moment: SecondMoment | None = None, most: Block = 128) -> Quantized:
        """Like ``quantize``. Rows are independent, so each of the two matrices is quantized only once."""
        number = next(i for i, base in enumerate(self._bases) if weights.base is base)
        base = self._bases[number]
        key = (number, format, most)
        if key not in self._quantized:
            self._quantized[key] = quantize(base, format, moment, most)
        first = (weights.ctypes.data - base.ctypes.data) // base.strides[0]
        whole, rows = self._quantized[key], slice(first, first + len(weights))
        return Quantized(whole.packed[rows], whole.scales[rows])


def carried_numbers(weights: np.ndarray, format: Format) -> SourceNumbers:
    """``weights`` rounded to "fp8" or "mxfp4", with the same scale for all blocks of 128."""
    largest = np.abs(weights).max()
    if format == "fp8":
        scale = largest / float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
        numbers = (weights / scale).astype(ml_dtypes.float8_e4m3fn)
    else:
        scale = 2.0 ** np.floor(np.log2(largest) - 2) * MXFP4.unit
        floats = (weights / scale * MXFP4.unit).astype(ml_dtypes.float4_e2m1fn)
        numbers = (floats.astype(np.float32) / MXFP4.unit).astype(np.int8)
    rows, columns = weights.shape
    return SourceNumbers(numbers, np.full((rows, -(-columns // BLOCK)), scale, np.float32), BLOCK)


class Builder:
    """Builds sessions of one shape, with their files in ``folder``."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        self.shape, self.folder = shape, folder
        experts = Experts(shape)
        self.experts, self._quantize, self._carried = experts.all, experts.quantized, experts.carried

    def rewritten(self, format: str, lowering: str, bits: int, threads: int) -> Run:
        """Lowering "native" or "stock", activations in ``bits``."""
        name = f"{lowering}-{format}-{bits}"
        path = self.folder / f"{name}.onnx"
        if not path.is_file():
            slots = [Slot(expert=e, format=f) for e, f in enumerate(formats_of(self.shape, format))]
            experts = self._carried(format) if format in CARRIED else self.experts
            source = lambda _, e: experts[e]  # noqa: E731
            realised = with_options(LOWERINGS[lowering], activation_bits=bits, dense_format="stored")
            lowered = realised.lower(_experts_node(self.shape), _plan(self.shape, slots), source)
            data = (self.folder / f"{name}.data").open("wb", buffering=WRITTEN_AT_ONCE)
            with data as file, mock.patch.object(slot_weights, "quantize", self._quantize):
                locate(lowered.model, write_weights(lowered.experts, file).starts, f"{name}.data")
            onnx.save(lowered.model, path)
        session = _session(path, threads)
        return lambda batch: session.run(["y"], {"x": batch.x, "ids": batch.ids, "gates": batch.gates})[0]

    def fused(self, format: str, threads: int) -> Run:
        """ONNX Runtime's own MoE ("fp32") or QMoE ("int8", "int4"), which take router logits."""
        path = self.folder / f"fused-{format}.onnx"
        if not path.is_file():
            onnx.save(self._fused_model(format), path, save_as_external_data=True, location=f"fused-{format}.data")
        session = _session(path, threads)
        return lambda batch: session.run(None, {"x": batch.x, "logits": batch.logits})[0]

    def llama_cpp(self, library: ctypes.CDLL, format: str, threads: int) -> Run:
        """llama.cpp's operators, on the same integers as ours."""
        shape, half = self.shape, self.shape.intermediate
        layer = LlamaCppLayer(library, format, shape.hidden, shape.intermediate, shape.experts, shape.top_k, threads)

        def matrix(weights: np.ndarray) -> np.ndarray:
            return weights if format == "fp32" else blocks(self._quantize(weights, format), format)  # type: ignore[arg-type]

        up = [matrix(expert.up) for expert in self.experts]
        layer.set_weights("gate", np.stack([m[:half] for m in up]))
        layer.set_weights("linear", np.stack([m[half:] for m in up]))
        layer.set_weights("down", np.stack([matrix(expert.down) for expert in self.experts]))
        return lambda batch: layer.run(batch.x, batch.ids, batch.gates)

    def _fused_model(self, format: str) -> onnx.ModelProto:
        shape, weights = self.shape, []
        attributes: dict[str, Any] = {
            "k": shape.top_k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "normalize_routing_weights": 1,
        }
        for i in (1, 2):
            rows = _interleaved if i == 1 else np.asarray
            matrices = [e.up if i == 1 else e.down for e in self.experts]
            if format == "fp32":
                parts = {f"fc{i}": [rows(matrix) for matrix in matrices]}
            else:
                quantized = [self._quantize(matrix, format) for matrix in matrices]  # type: ignore[arg-type]
                parts = {f"fc{i}": [rows(q.packed) for q in quantized], f"fc{i}_scales": [rows(q.scales) for q in quantized]}
            for name, arrays in parts.items():
                weights.append(onnx.numpy_helper.from_array(np.stack(arrays), name))
        if format == "fp32":
            inputs = ["x", "logits", "fc1", "", "fc2"]
        else:
            inputs = ["x", "logits", "fc1", "fc1_scales", "", "fc2", "fc2_scales"]
            attributes |= {
                "expert_weight_bits": SLOT_FORMATS[cast(Format, format)].bits,
                "block_size": block_size(shape.hidden),
                "accuracy_level": 4,
            }
        node = helper.make_node("MoE" if format == "fp32" else "QMoE", inputs, ["y"], domain="com.microsoft", **attributes)
        floats = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "logits", "y")]
        graph = helper.make_graph([node], "fused", floats[:2], floats[2:], weights)
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)

    def grouped_mm(self, format: str, threads: int) -> Run:
        """torch's grouped_mm with weights and activations in "fp32", "fp16" or "bf16", as transformers' experts call it."""
        import torch

        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[format]
        up = torch.from_numpy(np.stack([e.up for e in self.experts])).to(dtype).transpose(1, 2)
        down = torch.from_numpy(np.stack([e.down for e in self.experts])).to(dtype).transpose(1, 2)
        experts, top_k = self.shape.experts, self.shape.top_k

        @torch.inference_mode()
        def run(batch: Batch) -> np.ndarray:
            torch.set_num_threads(threads)
            chosen = torch.from_numpy(batch.ids).reshape(-1)
            order = chosen.argsort(stable=True)
            ends = torch.bincount(chosen, minlength=experts).cumsum(0).int()
            x = torch.from_numpy(batch.x).to(dtype)[order // top_k]
            gate, linear = torch.nn.functional.grouped_mm(x, up, offs=ends).chunk(2, 1)
            out = torch.nn.functional.grouped_mm(torch.nn.functional.silu(gate) * linear, down, offs=ends).float()
            out *= torch.from_numpy(batch.gates).reshape(-1)[order, None]
            return torch.zeros(batch.x.shape).index_add_(0, order // top_k, out).numpy()

        return run


def _interleaved(up: np.ndarray) -> np.ndarray:
    """Gate and up rows in turn, as swiglu_fusion=1 wants them."""
    half = len(up) // 2
    return np.stack([up[:half], up[half:]], axis=1).reshape(up.shape)


def _plan(shape: Shape, slots: list[Slot]) -> Plan:
    predicted = LayerPrediction(
        lis_before=1, lis_after=1, strict_lis_before=1, strict_lis_after=1, bytes_before=1, bytes_after=1, error=0
    )
    layer = LayerPlan(name=LAYER, index=0, geometry=shape.geometry, slots=slots, predicted=predicted)
    return Plan(
        tool="benchmark", model=shape.name, model_type="benchmark", fingerprint="0" * 64, calibration_sha256=None, policy="none",
        target="cpu", memory=1.0, layers=[layer],
    )  # fmt: skip


def _experts_node(shape: Shape) -> onnx.ModelProto:
    node = helper.make_node("Experts", ["x", "ids", "gates"], ["y"], name="experts", domain="rq.moe", layer=LAYER)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", shape.hidden]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["T", shape.top_k]),
        helper.make_tensor_value_info("gates", TensorProto.FLOAT, ["T", shape.top_k]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", shape.hidden])]
    graph = helper.make_graph([node], "layer", inputs, outputs)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("rq.moe", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Otherwise its threads spin for about 50 ms after a run, on the cores of the variant that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
