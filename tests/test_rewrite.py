"""The rewrite of one MoE layer, in both lowerings, against a float64 reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from scipy.special import erf

from rq_compile.architectures.geometry import GATED, Activation, ExpertGeometry
from rq_compile.architectures.layers import ExpertWeights
from rq_compile.errors import UserError
from rq_compile.planning.schema import LayerPlan, LayerPrediction, Plan, Slot
from rq_compile.quantization.quantizer import stored
from rq_compile.rewrite.contract import ContractError
from rq_compile.rewrite.experts_to_slots import offsets_name
from rq_compile.rewrite.rewrite import rewrite
from rq_compile.targets.library import library_path
from rq_compile.targets.weights_file import locate, write_weights

LAYER = "model.layers.0.mlp.experts"
PREDICTION = LayerPrediction(
    lis_before=1, lis_after=1, strict_lis_before=1, strict_lis_after=1, bytes_before=1, bytes_after=1, error=0
)
LOWERINGS = ("native", "stock")


def plan_of(geometry: ExpertGeometry, slots: list[tuple[int, str]], name: str = LAYER) -> Plan:
    layer = LayerPlan(
        name=name, index=0, geometry=geometry, slots=[Slot(expert=e, format=f) for e, f in slots], predicted=PREDICTION
    )
    return Plan(
        tool="test", model="m", model_type="olmoe", fingerprint="f", calibration_sha256=None, policy="none", target="cpu",
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
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("rq.moe", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def random_experts(geometry: ExpertGeometry, seed: int = 0) -> list[ExpertWeights]:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    up, down, hidden, width = geometry.up_rows, geometry.hidden, geometry.hidden, geometry.intermediate
    return [
        ExpertWeights(
            3 * normal(up, hidden),
            normal(down, width),
            normal(up) if geometry.bias else None,
            normal(down) if geometry.bias else None,
        )
        for _ in range(geometry.experts)
    ]


@dataclass
class Layer:
    """A compiled layer. ``run`` returns the output and the slots' cumulative rows."""

    session: onnxruntime.InferenceSession

    def run(self, x: np.ndarray, ids: np.ndarray, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(self.session.run(["y", offsets_name(LAYER)], {"x": x, "ids": ids, "gates": gates}))


def compiled(plan: Plan, experts: list[ExpertWeights], lowering: str, folder: Path) -> Layer:
    geometry = plan.layers[0].geometry
    model, weights, _ = rewrite(one_layer(geometry.hidden, geometry.top_k), plan, lambda _, e: experts[e], lowering)
    with (folder / "layer.data").open("wb") as file:
        written = write_weights(weights, file)
    locate(model, written, "layer.data")
    model.graph.output.append(helper.make_tensor_value_info(offsets_name(LAYER), TensorProto.INT32, [None]))
    onnx.save(model, folder / "layer.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if lowering == "native":
        options.register_custom_ops_library(str(library_path()))
    return Layer(onnxruntime.InferenceSession(str(folder / "layer.onnx"), options, providers=["CPUExecutionProvider"]))


def slot_of_each(ids: np.ndarray, slots: list[tuple[int, str]]) -> list[int]:
    """The dispatch rule, said plainly: an expert's tokens go to its slots in turn."""
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
        return np.maximum(h, 0) if kind == "relu" else gelu(h)
    gate, up = np.split(h, 2, axis=-1)
    if kind == "clamped_swiglu":
        gate, up = np.minimum(gate, geometry.limit), np.clip(up, -geometry.limit, geometry.limit)
        return (up + 1) * gate / (1 + np.exp(-geometry.alpha * gate))
    return up * (gate / (1 + np.exp(-gate)) if kind == "swiglu" else gelu(gate, kind == "geglu_tanh"))


def reference(
    x: np.ndarray, ids: np.ndarray, gates: np.ndarray, geometry: ExpertGeometry, slots: list[tuple[int, str]], experts: list
) -> np.ndarray:
    y = np.zeros(x.shape)
    chosen = np.array(slot_of_each(ids, slots)).reshape(ids.shape)
    for token, choice in np.ndindex(*ids.shape):
        expert, format = slots[chosen[token, choice]]
        weights = experts[expert]
        up, down = (stored(w, format).astype(np.float64) for w in (weights.up, weights.down))
        h = up @ x[token].astype(np.float64) + (weights.up_bias if geometry.bias else 0)
        out = down @ activate(h, geometry) + (weights.down_bias if geometry.bias else 0)
        y[token] += gates[token, choice] * out
    return y


def batch(geometry: ExpertGeometry, tokens: int, seed: int = 1, only: int | None = None) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, geometry.hidden)).astype(np.float32)
    ids = np.array([random.permutation(geometry.experts)[: geometry.top_k] for _ in range(tokens)], np.int64)
    ids = ids.reshape(tokens, geometry.top_k) if only is None else np.full((tokens, geometry.top_k), only, np.int64)
    return x, ids, random.random((tokens, geometry.top_k)).astype(np.float32)


PLAIN = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32")]
MIXED = [(0, "int8"), (3, "int4"), (1, "fp16"), (2, "int8"), (0, "int8"), (3, "int4"), (0, "fp16"), (1, "fp16")]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_every_activation(activation: Activation, bias: bool, lowering: str, tmp_path: Path) -> None:
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=48, activation=activation, bias=bias, limit=1.5)
    experts = random_experts(geometry)
    for slots in (PLAIN, MIXED):
        inputs = batch(geometry, 13)
        y, _ = compiled(plan_of(geometry, slots), experts, lowering, tmp_path).run(*inputs)
        np.testing.assert_allclose(y, reference(*inputs, geometry, slots, experts), atol=3e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 16), (40, 24), (128, 192)])
def test_every_format_and_block(hidden: int, intermediate: int, format: str, lowering: str, tmp_path: Path) -> None:
    geometry = ExpertGeometry(experts=3, top_k=1, hidden=hidden, intermediate=intermediate, activation="swiglu")
    experts, slots = random_experts(geometry), [(e, format) for e in (0, 1, 2, 1)]
    inputs = batch(geometry, 7)
    y, _ = compiled(plan_of(geometry, slots), experts, lowering, tmp_path).run(*inputs)
    np.testing.assert_allclose(y, reference(*inputs, geometry, slots, experts), atol=5e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_extreme_batches(lowering: str, tmp_path: Path) -> None:
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=32, activation="swiglu")
    experts = random_experts(geometry)
    layer = compiled(plan_of(geometry, MIXED), experts, lowering, tmp_path)
    for tokens, only in ((0, None), (1, None), (1, 0), (40, 0), (200, None)):
        inputs = batch(geometry, tokens, only=only)
        y, offsets = layer.run(*inputs)
        assert y.shape == (tokens, 32)
        np.testing.assert_allclose(y, reference(*inputs, geometry, MIXED, experts), atol=3e-5)
        assert np.diff(offsets).tolist() == np.bincount(slot_of_each(inputs[1], MIXED), minlength=len(MIXED)).tolist()


@pytest.fixture(scope="module", params=LOWERINGS)
def dispatching(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layer:
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=16, intermediate=16, activation="relu")
    folder = tmp_path_factory.mktemp(request.param)
    return compiled(plan_of(geometry, MIXED), random_experts(geometry), request.param, folder)


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60))
def test_tokens_of_an_expert_take_its_slots_in_turn(dispatching: Layer, pairs: list[tuple[int, int]]) -> None:
    ids = np.array(pairs, np.int64).reshape(-1, 2)
    x = np.ones((len(ids), 16), np.float32)
    _, offsets = dispatching.run(x, ids, np.ones(ids.shape, np.float32))
    assert offsets.dtype == np.int32
    assert np.diff(offsets).tolist() == np.bincount(slot_of_each(ids, MIXED), minlength=len(MIXED)).tolist()


def test_answers_do_not_change_from_run_to_run(dispatching: Layer) -> None:
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=16, intermediate=16, activation="relu")
    inputs = batch(geometry, 100)
    first, _ = dispatching.run(*inputs)
    assert all(np.array_equal(first, dispatching.run(*inputs)[0]) for _ in range(3))


def test_stock_writes_equal_copies_once_and_native_each() -> None:
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=32, activation="swiglu")
    source = lambda _, e: random_experts(geometry)[e]  # noqa: E731
    sizes = {
        lowering: sum(w.bytes for w in rewrite(one_layer(32, 2), plan_of(geometry, MIXED), source, lowering)[1])
        for lowering in LOWERINGS
    }
    distinct = sum(geometry.expert_bytes(format) for _, format in set(MIXED))
    assert sizes == {"native": sum(geometry.expert_bytes(format) for _, format in MIXED), "stock": distinct}


def test_stock_needs_no_custom_op_and_counts_are_reported() -> None:
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=32, activation="swiglu")
    experts = random_experts(geometry)
    model, _, counts = rewrite(one_layer(32, 2), plan_of(geometry, MIXED), lambda _, e: experts[e], "stock")
    assert {node.domain for node in model.graph.node} == {""}
    assert "com.microsoft" in {entry.domain for entry in model.opset_import}
    assert counts == {
        "experts nodes rewritten": 1, "replicas added": 4, "slots in int8": 3, "slots in int4": 2, "slots in fp16": 3
    }  # fmt: skip


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_layers_that_differ_are_named(lowering: str) -> None:
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=32, activation="swiglu")
    with pytest.raises(UserError, match=r"MoE layer other\.experts of the model is not in the plan"):
        rewrite(one_layer(32, 2, "other.experts"), plan_of(geometry, PLAIN), lambda _, e: None, lowering)
    model = one_layer(32, 2)
    del model.graph.node[:]
    with pytest.raises(UserError, match=f"layer {LAYER} of the plan is not an MoE layer of the model"):
        rewrite(model, plan_of(geometry, PLAIN), lambda _, e: None, lowering)


def test_a_pass_out_of_order_is_the_authors_fault() -> None:
    import onnx_graphsurgeon as gs

    from rq_compile.rewrite.stock_experts import stock_experts

    geometry = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=32, activation="swiglu")
    with pytest.raises(ContractError, match=f"stock_experts requires both projections of {LAYER}"):
        stock_experts(gs.import_onnx(one_layer(32, 2)), plan_of(geometry, PLAIN).layers)
