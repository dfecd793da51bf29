"""Layers with experts that are replaced by their mean outputs, in every lowering, compared with a float64 reference."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from moe_nodes import attributes_of, compiled_layer, constants_of, evaluated, geometry_of, inputs_of, moe_nodes
from one_layer import LAYER, batch, compiled, one_layer, plan_of, random_experts, reference, slot_of_each

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.lowerings import LOWERINGS, Plugins, lowering_of
from rq_compile.planning.schema import LayerPlan, Slot
from rq_compile.quantization.formats import Format
from rq_compile.rewrite.batched_experts import ExpectedCapacity

# Native is compared bit for bit with itself; "batched" has both kinds of capacity.
VARIANTS = {
    "native": ("native", None),
    "stock": ("stock", None),
    "batched": ("batched", None),
    "expected capacity": ("batched", ExpectedCapacity(headroom=0.5, least=2)),
}
SOME: list[tuple[int, Format]] = [(1, "int8"), (0, "int4"), (3, "int4"), (0, "int4"), (2, "constant")]
MOST: list[tuple[int, Format]] = [(3, "int8"), (1, "constant"), (0, "constant"), (2, "constant")]
ALL: list[tuple[int, Format]] = [(e, "constant") for e in (2, 0, 1, 3)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("slots", [SOME, MOST, ALL], ids=["some", "most", "all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_constants_take_the_place_of_outputs(variant: str, slots: list[tuple[int, Format]], bias: bool, tmp_path: Path) -> None:
    lowering, expected = VARIANTS[variant]
    geometry = ExpertGeometry(experts=4, top_k=2, hidden=32, intermediate=48, activation="swiglu", bias=bias)
    experts = random_experts(geometry)
    layer = compiled(plan_of(geometry, slots), experts, lowering, tmp_path, expected=expected)
    for tokens, only in ((1, None), (1, 2), (17, None), (40, 2), (40, 3), (120, None)):
        inputs = batch(geometry, tokens, only=only)
        y, offsets = layer.run(*inputs)
        np.testing.assert_allclose(y, reference(*inputs, geometry, slots, experts), atol=3e-5)
        assert np.diff(offsets).tolist() == np.bincount(slot_of_each(inputs[1], slots), minlength=len(slots)).tolist()
    if expected is None:
        y, offsets = layer.run(*batch(geometry, 0))
        assert y.shape == (0, 32)
        assert not offsets.any()


def test_slots_in_constant_come_last_wherever_a_plan_lists_them() -> None:
    geometry = geometry_of()
    slots = [(2, "constant"), (1, "int8"), (0, "constant"), (3, "int4")]
    layer = plan_of(geometry, slots).layers[0]
    assert [(slot.expert, slot.format) for slot in layer.slots] == [slots[1], slots[3], slots[0], slots[2]]
    assert layer.constant_experts == [2, 0]
    assert layer.stored_bytes == geometry.expert_bytes("int8") + geometry.expert_bytes("int4") + 2 * 4 * geometry.hidden


def test_a_constant_expert_has_one_slot() -> None:
    layer = plan_of(geometry_of(), [(e, "int4") for e in range(4)]).layers[0]
    for further in ("int4", "constant"):
        held = [*layer.slots[:3], Slot(expert=3, format="constant"), Slot(expert=3, format=further)]
        with pytest.raises(ValueError, match="layer 0 has 2 slots for expert 3, but an expert in constant has one"):
            LayerPlan.model_validate({**layer.model_dump(), "slots": [slot.model_dump() for slot in held]})


@pytest.mark.parametrize("slots", [SOME, MOST])
def test_a_token_alone_and_among_others(slots: list[tuple[int, Format]], tmp_path: Path) -> None:
    geometry = ExpertGeometry(experts=4, top_k=3, hidden=64, intermediate=32, activation="swiglu")
    layer = compiled(plan_of(geometry, slots), random_experts(geometry), "native", tmp_path)
    x, ids, gates = batch(geometry, 30)
    together, _ = layer.run(x, ids, gates)
    for token in range(30):
        own = slice(token, token + 1)
        assert np.array_equal(layer.run(x[own], ids[own], gates[own])[0], together[own])


@pytest.mark.parametrize("lowering", [*LOWERINGS, "plugins"])
def test_the_described_weights_are_those_of_the_graph(lowering: str) -> None:
    geometry = geometry_of()
    kind = Plugins() if lowering == "plugins" else lowering_of(lowering)
    experts = random_experts(geometry)
    for slots in (SOME, ALL):
        plan = plan_of(geometry, slots)
        lowered = kind.graphs(one_layer(128, 2), plan, lambda _, e: experts[e])[0]
        written = {weight.name: weight.bytes for section in lowered.experts for weight in section.weights}
        assert sorted(written.values()) == sorted(weight.bytes for weight in kind.expert_weights(plan.layers[0]))
        assert written[f"{LAYER}.mean_outputs"] == 4 * 128 * len(plan.layers[0].constant_experts)


@pytest.mark.parametrize("slots", [SOME, MOST], ids=["some", "most"])
def test_the_node_of_the_gpu_libraries_ignores_constant_experts(slots: list[tuple[int, Format]], tmp_path: Path) -> None:
    geometry = geometry_of()
    model, experts = compiled_layer(geometry, slots, tmp_path)
    (node,) = moe_nodes(model)
    constants, computed = constants_of(model), [slot for slot in slots if slot[1] != "constant"]
    assert len(attributes_of(node)["formats"]) == len(computed)
    x, ids, gates = batch(geometry, 37)
    added = next(n for n in model.graph.node if n.op_type == "Add" and "constants" in n.name)
    del model.graph.output[:]
    for name, kind in ((inputs_of(node)["ids"], onnx.TensorProto.INT64), (added.input[1], onnx.TensorProto.FLOAT)):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    for other in [n for n in model.graph.node if n == node or n.op_type in ("Add", "Cast")]:
        model.graph.node.remove(other)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    seen, part = session.run(None, {"x": x, "ids": ids, "gates": gates})
    assert np.array_equal(seen, np.where(np.isin(ids, [expert for expert, _ in computed]), ids, -1))
    ours = evaluated(node, constants, x.astype(np.float16), seen, gates) + part
    np.testing.assert_allclose(ours, reference(x, ids, gates, geometry, slots, experts), atol=2e-2)


def test_a_layer_of_constants_needs_no_node(tmp_path: Path) -> None:
    model, experts = compiled_layer(geometry_of(), ALL, tmp_path)
    assert not moe_nodes(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x, ids, gates = batch(geometry_of(), 5)
    (y,) = session.run(None, {"ids": ids, "gates": gates, **({"x": x} if len(session.get_inputs()) == 3 else {})})
    np.testing.assert_allclose(y, reference(x, ids, gates, geometry_of(), ALL, experts), atol=1e-5)
