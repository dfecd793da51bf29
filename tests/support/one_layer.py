"""One MoE layer to compile and run in ONNX Runtime, random experts for it, and its expected result in float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from scipy.special import erf

from rq_compile.architectures.geometry import GATED, ExpertGeometry
from rq_compile.architectures.layers import ExpertWeights
from rq_compile.engine.library import library_path
from rq_compile.lowerings import LOWERINGS
from rq_compile.planning.schema import LayerPlan, LayerPrediction, Plan, Slot
from rq_compile.quantization.formats import Format
from rq_compile.quantization.quantizer import stored
from rq_compile.rewrite.batched_experts import ExpectedCapacity
from rq_compile.rewrite.experts_to_slots import offsets_name
from rq_compile.targets.weights_file import locate, write_weights

LAYER = "model.layers.0.mlp.experts"
PREDICTION = LayerPrediction(
    lis_before=1, lis_after=1, strict_lis_before=1, strict_lis_after=1, bytes_before=1, bytes_after=1, error=0
)
PLAIN: list[tuple[int, Format]] = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32")]
MIXED: list[tuple[int, Format]] = [
    (0, "int8"),
    (3, "int4"),
    (1, "fp16"),
    (2, "int8"),
    (0, "int8"),
    (3, "int4"),
    (0, "fp16"),
    (1, "fp16"),
]
FEW_BITS: list[tuple[int, Format]] = [(0, "int3"), (1, "int2"), (2, "fp16"), (3, "int4"), (0, "int2"), (3, "int8")]


def plan_of(geometry: ExpertGeometry, slots: Sequence[tuple[int, str]], name: str = LAYER) -> Plan:
    layer = LayerPlan(
        name=name,
        index=0,
        geometry=geometry,
        slots=[Slot(expert=e, format=cast(Format, f)) for e, f in slots],
        predicted=PREDICTION,
    )
    return Plan(
        tool="test", model="m", model_type="olmoe", fingerprint="f" * 64, calibration_sha256=None, policy="none", target="cpu",
        memory=1.0, layers=[layer],
    )  # fmt: skip


def one_layer(hidden: int, top_k: int, name: str = LAYER) -> onnx.ModelProto:
    node = helper.make_node("Experts", ["x", "ids", "gates"], ["y"], name="experts", domain="rq.moe", layer=name)
    graph = helper.make_graph(
        [node],
        "one layer",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", hidden]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["T", top_k]),
            helper.make_tensor_value_info("gates", TensorProto.FLOAT, ["T", top_k]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", hidden])],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("rq.moe", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def random_experts(geometry: ExpertGeometry, seed: int = 0) -> list[ExpertWeights]:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    means = np.random.default_rng([seed, 1]).standard_normal((geometry.experts, geometry.hidden)).astype(np.float32)
    up, down, hidden, width = geometry.up_rows, geometry.hidden, geometry.hidden, geometry.intermediate
    return [
        ExpertWeights(
            3 * normal(up, hidden),
            normal(down, width),
            normal(up) if geometry.bias else None,
            normal(down) if geometry.bias else None,
            mean_output=means[expert],
        )
        for expert in range(geometry.experts)
    ]


@dataclass
class Layer:
    """A compiled layer. ``run`` returns the output and the slots' cumulative rows."""

    session: onnxruntime.InferenceSession

    def run(self, x: np.ndarray, ids: np.ndarray, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(self.session.run(["y", offsets_name(LAYER)], {"x": x, "ids": ids, "gates": gates}))


def compiled(
    plan: Plan,
    experts: list[ExpertWeights],
    lowering: str,
    folder: Path,
    *,
    expected: ExpectedCapacity | None = None,
    threads: int = 1,
) -> Layer:
    geometry = plan.layers[0].geometry
    exported = one_layer(geometry.hidden, geometry.top_k)
    realised = LOWERINGS[lowering](**({"expected": expected} if expected else {}))
    lowered = realised.lower(exported, plan, lambda _, e: experts[e])
    model = lowered.model
    with (folder / "layer.data").open("wb") as file:
        written = write_weights(lowered.experts, file)
    locate(model, written.starts, "layer.data")
    model.graph.output.append(helper.make_tensor_value_info(offsets_name(LAYER), TensorProto.INT32, [None]))
    onnx.save(model, folder / "layer.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if lowering == "native":
        options.register_custom_ops_library(str(library_path()))
    return Layer(onnxruntime.InferenceSession(str(folder / "layer.onnx"), options, providers=["CPUExecutionProvider"]))


def slot_of_each(ids: np.ndarray, slots: Sequence[tuple[int, str]]) -> list[int]:
    """A direct implementation of the dispatch rule: an expert's tokens go to its slots in turn."""
    copies: dict[int, list[int]] = {}
    for slot, (expert, _) in enumerate(slots):
        copies.setdefault(expert, []).append(slot)
    seen = dict.fromkeys(copies, 0)
    chosen = []
    for expert in ids.reshape(-1).tolist():
        chosen.append(copies[expert][seen[expert] % len(copies[expert])])
        seen[expert] += 1
    return chosen


def gelu(x: np.ndarray, tanh: bool = False) -> np.ndarray:
    return x / 2 * (1 + (np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)) if tanh else erf(x / np.sqrt(2))))


def activate(h: np.ndarray, geometry: ExpertGeometry) -> np.ndarray:
    kind = geometry.activation
    if kind not in GATED:
        return {"relu": np.maximum(h, 0), "relu2": np.maximum(h, 0) ** 2}.get(kind, gelu(h))
    gate, up = np.split(h, 2, axis=-1)
    if kind == "clamped_swiglu":
        gate, up = np.minimum(gate, geometry.limit), np.clip(up, -geometry.limit, geometry.limit)
        return (up + 1) * gate / (1 + np.exp(-geometry.alpha * gate))
    if kind == "limited_swiglu":
        gate = np.minimum(gate, geometry.limit)
        return np.clip(up, -geometry.limit, geometry.limit) * gate / (1 + np.exp(-gate))
    return up * (gate / (1 + np.exp(-gate)) if kind == "swiglu" else gelu(gate, kind == "geglu_tanh"))


def reference(
    x: np.ndarray,
    ids: np.ndarray,
    gates: np.ndarray,
    geometry: ExpertGeometry,
    slots: Sequence[tuple[int, str]],
    experts: list[ExpertWeights],
) -> np.ndarray:
    y = np.zeros(x.shape)
    chosen = np.array(slot_of_each(ids, slots)).reshape(ids.shape)
    for token, choice in np.ndindex(*ids.shape):
        expert, format = slots[int(chosen[token, choice])]
        weights = experts[expert]
        if format == "constant":
            y[token] += gates[token, choice] * weights.mean_output
            continue
        up, down = (stored(w, cast(Format, format), most=geometry.block).astype(np.float64) for w in (weights.up, weights.down))
        h = up @ x[token].astype(np.float64) + (0 if weights.up_bias is None else weights.up_bias)
        out = down @ activate(h, geometry) + (0 if weights.down_bias is None else weights.down_bias)
        y[token] += gates[token, choice] * out
    return y


def batch(
    geometry: ExpertGeometry, tokens: int, seed: int = 1, only: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, geometry.hidden)).astype(np.float32)
    ids = np.array([random.permutation(geometry.experts)[: geometry.top_k] for _ in range(tokens)], np.int64)
    ids = ids.reshape(tokens, geometry.top_k) if only is None else np.full((tokens, geometry.top_k), only, np.int64)
    return x, ids, random.random((tokens, geometry.top_k)).astype(np.float32)
