"""The pass ``moe_layers``: a layer is one node with the inputs and attributes that the GPU libraries take."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from moe_nodes import (
    ACTIVATIONS,
    INT4_ALONE,
    attributes_of,
    compiled_layer,
    constants_of,
    evaluated,
    geometry_of,
    inputs_of,
    moe_nodes,
)
from one_layer import FEW_BITS, LAYER, MIXED, PLAIN, batch, one_layer, plan_of, random_experts, reference

from rq_compile.architectures.geometry import GATED, Activation
from rq_compile.architectures.layers import ExpertWeights
from rq_compile.errors import UserError
from rq_compile.lowerings import Batched, Lowering, Native, Plugins, Stock
from rq_compile.quantization.formats import Block
from rq_compile.rewrite.halves import HALVES


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_node_is_the_layer(activation: Activation, bias: bool, tmp_path: Path) -> None:
    geometry = geometry_of(activation, bias=bias)
    model, experts = compiled_layer(geometry, MIXED, tmp_path)
    (node,) = moe_nodes(model)
    for tokens, only in ((1, None), (37, None), (9, 3)):
        x, ids, gates = batch(geometry, tokens, only=only)
        x = x.astype(np.float16)
        wanted = reference(x, ids, gates, geometry, MIXED, experts)
        ours = evaluated(node, constants_of(model), x, ids, gates)
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("slots", [PLAIN, INT4_ALONE, MIXED, FEW_BITS])
def test_inputs_are_of_the_types_and_shapes_that_are_documented(slots: Any, tmp_path: Path) -> None:
    model, _ = compiled_layer(geometry_of(bias=slots is MIXED), slots, tmp_path)
    (node,) = moe_nodes(model)
    held = {name: constants_of(model).get(tensor) for name, tensor in inputs_of(node).items()}
    formats = {format for _, format in slots}
    bits = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
    groups = {"float": {"fp32", "fp16"}, **{format: {format} for format in bits}}
    assert {name.split("_")[1] for name in held if name.startswith("up_")} == {
        "index", *(group for group, of in groups.items() if of & formats), *(["bias"] if slots is MIXED else []),
    }  # fmt: skip
    copies = np.bincount([expert for expert, _ in slots]).max()
    wanted = {"replicas": ("int32", (4, copies)), "formats": ("int32", (len(slots),))}
    for name, rows, columns in (("up", 128, 128), ("down", 128, 64)):
        block = min(columns, 128)
        of_group = {
            group: len({e for e, f in slots if f in of}) for group, of in groups.items()
        }  # slots of one expert and format share a matrix
        wanted |= {
            f"{name}_index": ("int32", (len(slots),)),
            f"{name}_float_weights": ("float16", (of_group["float"], rows, columns)),
            **{f"{name}_{f}_packed": ("int8", (of_group[f], rows, columns * bits[f] // 8)) for f in bits},
            **{f"{name}_{f}_scales": ("float32", (of_group[f], rows, columns // block)) for f in bits},
            f"{name}_bias": ("float32", (len(slots), rows)),
        }
    found = {name: (str(array.dtype), array.shape) for name, array in held.items() if array is not None}
    assert found == {name: wanted[name] for name in found}
    assert found.keys() == held.keys() - {"x", "ids", "gates"}


def test_attributes_are_fields_and_where_the_parser_looks(tmp_path: Path) -> None:
    model, _ = compiled_layer(geometry_of("clamped_swiglu"), MIXED, tmp_path)
    (node,) = moe_nodes(model)
    assert node.name == f"{LAYER}.moe"
    attributes = attributes_of(node)
    assert attributes.pop("alpha") == pytest.approx(1.3)
    assert attributes.pop("limit") == pytest.approx(0.9)
    assert attributes == {
        "formats": [1, 2, 0, 1, 1, 2, 0, 0], "activation": b"clamped_swiglu",
        "plugin_namespace": b"rq.moe", "plugin_version": b"1",
    }  # fmt: skip


def test_shares_are_the_loads_if_all_are_known(tmp_path: Path) -> None:
    plan = plan_of(geometry_of(), PLAIN)
    (layer,) = plan.layers
    for loads in ((0.5, 0.25, 0.125, 0.125), (0.5, None, 0.25, 0.25)):
        slots = [slot.model_copy(update={"load": load}) for slot, load in zip(layer.slots, loads, strict=True)]
        known = plan.model_copy(update={"layers": [layer.model_copy(update={"slots": slots})]})
        model, _ = compiled_layer(layer.geometry, PLAIN, tmp_path, plan=known)
        assert attributes_of(moe_nodes(model)[0]).get("shares") == (None if None in loads else list(loads))


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_it_computes_in_half_between_casts(half: Any, tmp_path: Path) -> None:
    model, _ = compiled_layer(geometry_of(), MIXED, tmp_path, half=half)
    element = onnx.helper.np_dtype_to_tensor_dtype(HALVES[half])
    first, node, last = model.graph.node
    assert [attributes_of(cast)["to"] for cast in (first, last)] == [element, onnx.TensorProto.FLOAT]
    assert (first.input[0], first.output[0], last.input[0], last.output[0]) == ("x", node.input[0], node.output[0], "y")
    (told,) = (value for value in model.graph.value_info if value.name == node.output[0])
    assert told.type.tensor_type.elem_type == element
    assert {t.data_type for t in model.graph.initializer if "float_weights" in t.name} == {element}


def test_a_gated_projection_has_the_gates_rows_first(tmp_path: Path) -> None:
    """The order in which the kernels split a row tile, shown by the weights' values."""
    geometry = geometry_of()
    assert geometry.activation in GATED
    rows = np.repeat(np.arange(1.0, 3.0, dtype=np.float32), 64)  # 1 in the gate's rows, 2 in the up projection's
    experts = [ExpertWeights(np.tile(rows[:, None], (1, 128)), np.zeros((128, 64), np.float32), None, None) for _ in range(4)]
    model, _ = compiled_layer(geometry, PLAIN, tmp_path, experts=experts)
    held = constants_of(model)[inputs_of(moe_nodes(model)[0])["up_float_weights"]]
    assert (held[:, :64] == 1).all()
    assert (held[:, 64:] == 2).all()


def test_a_last_block_is_filled_up(tmp_path: Path) -> None:
    """80 columns are five blocks of 16, 72 are four and a half."""
    geometry = geometry_of(hidden=80, intermediate=72)
    model, experts = compiled_layer(geometry, INT4_ALONE, tmp_path)
    (node,) = moe_nodes(model)
    shapes = {name: constants_of(model)[tensor].shape for name, tensor in inputs_of(node).items() if "int4" in name}
    assert shapes["down_int4_packed"] == (4, 80, 40)
    assert shapes["down_int4_scales"] == (4, 80, 5)
    x, ids, gates = batch(geometry, 5)
    x = x.astype(np.float16)
    wanted = reference(x, ids, gates, geometry, INT4_ALONE, experts)
    np.testing.assert_allclose(evaluated(node, constants_of(model), x, ids, gates), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_weight_beyond_fp16_is_named(tmp_path: Path) -> None:
    geometry, experts = geometry_of(), random_experts(geometry_of())
    experts[2].down[3, 4] = 70000
    words = f"{LAYER}.down.float_weights has the value 7e+04, which float16 cannot hold; for .plan use --precision bf16"
    with pytest.raises(UserError, match=re.escape(words)):
        compiled_layer(geometry, PLAIN, tmp_path, experts=experts)
    compiled_layer(geometry, PLAIN, tmp_path, experts=experts, half="bf16")


def test_a_plan_of_other_layers_is_refused() -> None:
    plan = plan_of(geometry_of(), PLAIN, name="model.layers.7.mlp.experts")
    with pytest.raises(UserError, match=f"MoE layer {LAYER} of the model is not in the plan"):
        Plugins().lower(one_layer(128, 2), plan, lambda *_: pytest.fail("a weight was read"))


FP8, BESIDE = [(e, "fp8") for e in range(4)], [(0, "fp8"), (1, "int4"), (2, "bf16"), (3, "fp8")]


@pytest.mark.parametrize(
    ("lowering", "slots", "block", "held"),
    [
        (Plugins("fp16"), FP8, 64, ["fp8"] * 4),
        (Plugins("fp16"), FP8, 32, ["fp16"] * 4),
        (Plugins("bf16"), BESIDE, 64, ["bf16", "int4", "bf16", "bf16"]),
        (Stock(), BESIDE, 128, ["fp32", "int4", "fp32", "fp32"]),
        (Batched(), FP8, 128, ["fp32"] * 4),
        (Batched(), [(e, "mxfp4") for e in range(4)], 32, ["int8"] * 4),
        (Plugins("bf16"), FEW_BITS, 64, ["int3", "int2", "fp16", "int4", "int2", "int8"]),
        (Stock(), FEW_BITS, 64, ["int4", "int4", "fp16", "int4", "int4", "int8"]),
        (Native(), FEW_BITS, 64, ["int3", "int2", "fp16", "int4", "int2", "int8"]),
        (Native(), BESIDE, 64, ["fp8", "int4", "bf16", "fp8"]),
    ],
)
def test_formats_in_which_a_lowering_holds_those_of_a_plan(lowering: Lowering, slots: Any, block: Block, held: list[str]) -> None:
    (layer,) = plan_of(geometry_of(hidden=128, intermediate=128).model_copy(update={"block": block}), slots).layers
    assert [slot.format for slot in lowering.held(layer).slots] == held


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("sizes", [(128, 64), (80, 72), (96, 128)])
def test_few_bits_are_held_as_such(activation: Activation, sizes: tuple[int, int], tmp_path: Path) -> None:
    """In blocks of 128, 64, 32 and 16 columns, the last of which may be filled up."""
    geometry = geometry_of(activation, hidden=sizes[0], intermediate=sizes[1])
    model, experts = compiled_layer(geometry, FEW_BITS, tmp_path)
    (node,) = moe_nodes(model)
    assert list(attributes_of(node)["formats"]) == [5, 6, 0, 2, 6, 1]
    x, ids, gates = batch(geometry, 37)
    x = x.astype(np.float16)
    wanted = reference(x, ids, gates, geometry, FEW_BITS, experts)
    np.testing.assert_allclose(
        evaluated(node, constants_of(model), x, ids, gates), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max()
    )


def test_mxfp4_has_no_other_format_beside_it() -> None:
    geometry = geometry_of().model_copy(update={"block": 32})
    Plugins().check_layer(plan_of(geometry, [(e, "mxfp4") for e in range(4)]).layers[0])
    with pytest.raises(
        UserError, match="has slots in mxfp4 and in fp16, but the GPU kernels support mxfp4 only in layers without"
    ):
        Plugins().check_layer(plan_of(geometry, [(0, "fp16"), *((e, "mxfp4") for e in range(1, 4))]).layers[0])
