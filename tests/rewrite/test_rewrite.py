"""The rewrite of one MoE layer, in every lowering, compared with a float64 reference."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import LAYER, MIXED, PLAIN, Layer, batch, compiled, one_layer, plan_of, random_experts, reference, slot_of_each

from rq_compile import lowerings
from rq_compile.architectures.geometry import Activation, ExpertGeometry
from rq_compile.errors import UserError
from rq_compile.lowerings import Stock, lowering_of
from rq_compile.lowerings.lowering import unread
from rq_compile.quantization.formats import COMPUTED_FORMATS, SLOT_FORMATS, Format
from rq_compile.rewrite.contract import ContractError
from rq_compile.rewrite.report import counts_of

LOWERINGS = ("native", "stock", "batched")


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
@pytest.mark.parametrize("format", [format for format in COMPUTED_FORMATS if not SLOT_FORMATS[format].only_carried])
@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 16), (40, 24), (128, 192)])
def test_every_format_and_block(hidden: int, intermediate: int, format: Format, lowering: str, tmp_path: Path) -> None:
    if format not in lowerings.LOWERINGS[lowering].formats:
        pytest.skip(f"{lowering} does not take {format}")
    geometry = ExpertGeometry(experts=3, top_k=1, hidden=hidden, intermediate=intermediate, activation="swiglu")
    experts, slots = random_experts(geometry), [(e, format) for e in (0, 1, 2, 1)]
    inputs = batch(geometry, 7)
    y, _ = compiled(plan_of(geometry, slots), experts, lowering, tmp_path).run(*inputs)
    np.testing.assert_allclose(y, reference(*inputs, geometry, slots, experts), atol=5e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_blocks_of_32(lowering: str, tmp_path: Path) -> None:
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=128, intermediate=192, activation="swiglu", block=32)
    experts, inputs = random_experts(geometry), batch(geometry, 9)
    y, _ = compiled(plan_of(geometry, MIXED), experts, lowering, tmp_path).run(*inputs)
    np.testing.assert_allclose(y, reference(*inputs, geometry, MIXED, experts), atol=5e-5)
    wide = geometry.model_copy(update={"block": 128})
    assert np.abs(y - reference(*inputs, wide, MIXED, experts)).max() > 1e-2
    assert geometry.expert_bytes("int4") - wide.expert_bytes("int4") == 4 * (384 * (4 - 1) + 128 * (6 - 3))


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


def test_native_and_stock_write_equal_copies_once() -> None:
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=32, activation="swiglu")
    source = lambda _, e: random_experts(geometry)[e]  # noqa: E731
    sizes = {
        lowering: sum(w.bytes for w in lowering_of(lowering).lower(one_layer(32, 2), plan_of(geometry, MIXED), source).experts)
        for lowering in LOWERINGS
    }
    every = sum(geometry.expert_bytes(format) for _, format in MIXED)
    distinct = sum(geometry.expert_bytes(format) for _, format in set(MIXED))
    assert sizes == {"native": distinct, "stock": distinct, "batched": every}


def test_stock_needs_no_custom_op_and_counts_are_reported() -> None:
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=32, activation="swiglu")
    experts = random_experts(geometry)
    lowered = Stock().lower(one_layer(32, 2), plan_of(geometry, MIXED), lambda _, e: experts[e])
    assert {node.domain for node in lowered.model.graph.node} == {""}
    assert "com.microsoft" in {entry.domain for entry in lowered.model.opset_import}
    assert lowered.replaced == {"replicas added": 4, "slots in int8": 3, "slots in int4": 2, "slots in fp16": 3}
    assert counts_of(lowered.reports) == {
        "experts nodes rewritten": 1,
        "Dispatch nodes in standard ops": 1,
        "Combine nodes in standard ops": 1,
        "slots in branches": 8,
    }


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_layers_that_differ_are_named(lowering: str) -> None:
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=32, activation="swiglu")
    with pytest.raises(UserError, match=r"MoE layer other\.experts of the model is not in the plan"):
        lowering_of(lowering).lower(one_layer(32, 2, "other.experts"), plan_of(geometry, PLAIN), unread)
    model = one_layer(32, 2)
    del model.graph.node[:]
    with pytest.raises(UserError, match=f"layer {LAYER} of the plan is not an MoE layer of the model"):
        lowering_of(lowering).lower(model, plan_of(geometry, PLAIN), unread)


def test_a_pass_out_of_order_is_the_authors_fault() -> None:
    import onnx_graphsurgeon as gs

    from rq_compile.rewrite.stock_experts import stock_experts

    geometry = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=32, activation="swiglu")
    with pytest.raises(ContractError, match=f"stock_experts requires both projections of {LAYER}"):
        stock_experts(gs.import_onnx(one_layer(32, 2)), plan_of(geometry, PLAIN).layers)
