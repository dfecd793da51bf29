"""The batched lowering: lanes of any class and capacity give every row its result, and packed weights stay packed."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import MIXED, Layer, batch, compiled, one_layer, plan_of, random_experts, reference
from onnx.reference import ReferenceEvaluator

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.lowerings import Batched
from rq_compile.planning.schema import Plan
from rq_compile.rewrite.batched_experts import ExpectedCapacity, batched_experts
from rq_compile.rewrite.contract import ContractError
from rq_compile.rewrite.lane_weights import lane_weights
from rq_compile.rewrite.weights import INT4, stored

GEOMETRY = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=48, activation="swiglu", bias=True)
EXPERTS = random_experts(GEOMETRY)
CLASSES = (0, 1, 0, 0, 2, 1, 1, 0)
LOADS = (0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05)
# So narrow that the busier slots of these tests need further passes.
EXPECTED = {"capacity of the batch": None, "expected capacity": ExpectedCapacity(headroom=0.5, least=2)}


def planned() -> Plan:
    plan = plan_of(GEOMETRY, MIXED)
    slots = [
        slot.model_copy(update={"capacity_class": number, "load": load})
        for slot, number, load in zip(plan.layers[0].slots, CLASSES, LOADS, strict=True)
    ]
    return plan.model_copy(update={"layers": [plan.layers[0].model_copy(update={"slots": slots})]})


@pytest.fixture(scope="module", params=list(EXPECTED.values()), ids=list(EXPECTED))
def layer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layer:
    return compiled(planned(), EXPERTS, "batched", tmp_path_factory.mktemp("batched"), expected=request.param, threads=2)


@pytest.mark.parametrize(("tokens", "only"), [(1, None), (1, 0), (16, None), (100, 2), (100, 3), (333, None)])
def test_no_row_is_lost(layer: Layer, tokens: int, only: int | None) -> None:
    inputs = batch(GEOMETRY, tokens, seed=tokens, only=only)
    y, _ = layer.run(*inputs)
    np.testing.assert_allclose(y, reference(*inputs, GEOMETRY, MIXED, EXPERTS), atol=3e-5)


def test_no_token_at_all(tmp_path: Path) -> None:
    y, offsets = compiled(planned(), EXPERTS, "batched", tmp_path).run(*batch(GEOMETRY, 0))
    assert y.shape == (0, GEOMETRY.hidden)
    assert not offsets.any()


@settings(max_examples=40, deadline=None)
@given(chosen=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_any_routing(layer: Layer, chosen: list[tuple[int, int]]) -> None:
    ids = np.array(chosen, np.int64).reshape(-1, 2)
    x, _, gates = batch(GEOMETRY, len(ids), seed=len(ids))
    y, _ = layer.run(x, ids, gates)
    np.testing.assert_allclose(np.asarray(y), reference(x, ids, gates, GEOMETRY, MIXED, EXPERTS), atol=3e-5)


def test_the_same_bits_from_run_to_run(layer: Layer) -> None:
    inputs = batch(GEOMETRY, 200)
    first, _ = layer.run(*inputs)
    assert all(np.array_equal(first, layer.run(*inputs)[0]) for _ in range(3))


def test_a_token_that_is_not_finite_spoils_no_other(layer: Layer) -> None:
    x, ids, gates = batch(GEOMETRY, 50)
    clean, _ = layer.run(x, ids, gates)
    x[7], x[20] = np.nan, np.inf
    spoilt, _ = layer.run(x, ids, gates)
    others = np.delete(np.arange(50), [7, 20])
    assert np.isnan(spoilt[7]).all()
    assert np.array_equal(spoilt[others], clean[others])


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("expected", EXPECTED.values(), ids=EXPECTED.keys())
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(
    expected: ExpectedCapacity | None, format: str, tmp_path: Path
) -> None:
    slots = [(expert, format) for expert in (0, 1, 2, 3, 1)]
    layer = compiled(plan_of(GEOMETRY, slots), EXPERTS, "batched", tmp_path, expected=expected, threads=2)
    inputs = batch(GEOMETRY, 64)
    together, _ = layer.run(*inputs)
    for tokens in (1, 2, 3, 31):
        alone, _ = layer.run(*(values[:tokens] for values in inputs))
        assert np.array_equal(alone, together[:tokens])


@pytest.mark.parametrize("expected", EXPECTED.values(), ids=EXPECTED.keys())
def test_standard_ops_with_one_product_for_each_format_and_class(expected: ExpectedCapacity | None) -> None:
    model = Batched(expected).lower(one_layer(32, 2), planned(), lambda _, e: EXPERTS[e]).model
    assert [entry.domain for entry in model.opset_import] == [""]
    nodes = list(every_node(model.graph))
    assert {node.domain for node in nodes} == {""}
    products = 2 * len(set(zip((f for _, f in MIXED), CLASSES, strict=True)))
    ops = [node.op_type for node in nodes]
    assert ops.count("DequantizeLinear") == 6
    # The first pass, and the loop for the other passes.
    assert ops.count("MatMul") == (2 * products if expected else products)


@pytest.mark.parametrize("expected", EXPECTED.values(), ids=EXPECTED.keys())
def test_onnx_itself_runs_it(expected: ExpectedCapacity | None, tmp_path: Path) -> None:
    compiled(planned(), EXPERTS, "batched", tmp_path, expected=expected)
    onnx.checker.check_model(str(tmp_path / "layer.onnx"), full_check=True)
    x, ids, gates = batch(GEOMETRY, 20)
    (y,) = ReferenceEvaluator(onnx.load(tmp_path / "layer.onnx")).run(["y"], {"x": x, "ids": ids, "gates": gates})
    np.testing.assert_allclose(np.asarray(y), reference(x, ids, gates, GEOMETRY, MIXED, EXPERTS), atol=3e-5)


def test_weights_stay_packed_once_loaded(tmp_path: Path) -> None:
    compiled(planned(), EXPERTS, "batched", tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "layer.onnx"), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    held = {tensor.name: tensor.data_type for graph in every_graph(optimized.graph) for tensor in graph.initializer}
    inputs = [node.input[0] for node in every_node(optimized.graph) if node.op_type == "DequantizeLinear"]
    assert sorted(held[name] for name in inputs) == 4 * [onnx.TensorProto.INT8] + 2 * [onnx.TensorProto.INT4]


def test_int4_is_written_two_to_a_byte() -> None:
    values = np.random.default_rng(0).integers(-8, 8, (4, 6)).astype(np.int8)
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=values.shape, raw_data=stored(values, INT4).tobytes())
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), values)


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_few_tokens_need_no_further_pass_whatever_they_choose(tokens: int, tmp_path: Path) -> None:
    layer = compiled(planned(), EXPERTS, "batched", tmp_path, expected=ExpectedCapacity(headroom=0.1, least=16, most=16))
    graph = onnx.load(tmp_path / "layer.onnx", load_external_data=False).graph
    assert not any(node.op_type == "Loop" for node in graph.node)
    x, ids, gates = batch(GEOMETRY, tokens)
    for chosen in (ids, np.tile([[3, 0]], (tokens, 1))):
        y, _ = layer.run(x, chosen, gates)
        np.testing.assert_allclose(y, reference(x, chosen, gates, GEOMETRY, MIXED, EXPERTS), atol=3e-5)


def test_int8_with_a_scale_for_a_whole_column() -> None:
    plan = planned()
    slots = [slot for slot in plan.layers[0].slots if slot.format == "int8"]
    weights = lane_weights(plan.layers[0], slots, "name", "down", lambda _, e: EXPERTS[e], whole_columns=True)
    assert weights.scales is not None
    assert weights.scales.shape == (len(slots), 1, GEOMETRY.hidden)
    for slot, piece in zip(slots, weights.pieces, strict=True):
        q, scales, _ = piece.values()
        assert np.abs(q).max(axis=0).tolist() == [127] * GEOMETRY.hidden
        error = q * scales - EXPERTS[slot.expert].down.T
        assert (np.abs(error) <= scales * 0.5001).all()


def test_an_opset_without_blocks_is_refused() -> None:
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(one_layer(32, 2))
    graph.opset = 20
    with pytest.raises(ContractError, match="batched_experts requires opset 21 or later"):
        batched_experts(graph, planned().layers, lambda _, e: EXPERTS[e])


def every_graph(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return [graph, *(deeper for subgraph in inner for deeper in every_graph(subgraph))]


def every_node(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for subgraph in every_graph(graph) for node in subgraph.node]
