"""Any sizes and any numbers in the index inputs give a result or an error of the session, never a crash.

Worth running with a library built with RQ_SANITIZE (see plugins/onnxruntime/README.md), which aborts at a read out of bounds.
"""

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from op_nodes import run_op

REFUSALS = (Fail, InvalidArgument, RuntimeException)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def answer(op: str, inputs: dict[str, Any], kinds: Any, **attributes: Any) -> Any:
    """The outputs, or None if the session raises an error."""
    try:
        return run_op(op, inputs, kinds, **attributes)
    except REFUSALS as error:
        if "rq.moe" not in str(error):
            raise
        return None


def near(draw: Any, right: int) -> int:
    """Mostly ``right``, sometimes a slightly different number."""
    return max(0, right + draw(st.sampled_from([0] * 60 + [-1, 1, 7, -right])))


@st.composite
def gemms(draw: st.DrawFn) -> tuple[Any, ...]:
    slots, top_k, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 9))
    columns, outputs, block = draw(st.integers(1, 70)), draw(st.integers(1, 40)), draw(st.sampled_from([16, 32, 48, 64]))
    gather, activation = draw(st.booleans()), draw(st.sampled_from(["none", "swiglu", "relu"]))
    formats = draw(st.lists(st.integers(0, 6), min_size=slots, max_size=slots))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    pairs, blocks, parts = tokens * top_k, -(-columns // block), 1 + (activation == "swiglu")
    panels = parts * -(-outputs // 16)

    def numbers(kind: Any, *shape: int) -> Any:
        sizes = [near(draw, size) for size in shape]
        return random.integers(0, 256, sizes).astype(np.uint8) if kind == np.uint8 else random.normal(size=sizes).astype(kind)

    def packed(format: int, bits: int, kind_of_scales: Any = np.float32) -> Any:
        if not (count := formats.count(format)):
            return None, None
        words = blocks * -(-block * bits // 32)
        return numbers(np.uint8, count, panels, words, 64), numbers(kind_of_scales, count, panels, blocks, 16)

    rows = random.permutation(pairs).astype(np.int32)
    offsets = np.sort(random.integers(0, pairs + 1, slots + 1)).astype(np.int32)
    offsets[0], offsets[-1] = 0, pairs
    for index in (rows, offsets):
        if len(index) and draw(st.integers(0, 9)) == 0:
            index[random.integers(len(index))] = draw(st.sampled_from([-1, 1, 2**31 - 1, -(2**31), pairs, slots]))
    float_type = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    inputs = {
        "x": numbers(np.float32, tokens if gather else pairs, columns),
        "rows": rows[: near(draw, pairs)],
        "offsets": offsets[: near(draw, slots + 1)],
        "float_weights": numbers(float_type, formats.count(0), panels, columns, 16) if 0 in formats else None,
    }
    inputs["int8_packed"], inputs["int8_scales"] = packed(1, 8)
    inputs["int4_packed"], inputs["int4_scales"] = packed(2, 4)
    inputs["mxfp4_packed"], inputs["mxfp4_scales"] = packed(3, 4, np.uint8)
    inputs["fp8_packed"], inputs["fp8_scales"] = packed(4, 8)
    inputs["int3_packed"], inputs["int3_scales"] = packed(5, 3)
    inputs["int2_packed"], inputs["int2_scales"] = packed(6, 2)
    inputs["bias"] = numbers(np.float32, slots, outputs * parts) if draw(st.booleans()) else None
    attributes = {"formats": formats, "outputs": outputs, "gather": int(gather), "activation": activation}
    return inputs, attributes | {"activation_bits": draw(st.sampled_from([8, 32]))}, (pairs, outputs)


@quick
@given(gemms())
def test_expert_gemm(gemm: tuple[Any, ...]) -> None:
    inputs, attributes, shape = gemm
    y = answer("ExpertGemm", inputs, {"y": TensorProto.FLOAT}, **attributes)
    assert y is None or y[0].shape[1] == shape[1]


@quick
@given(st.data())
def test_dispatch_then_combine(data: st.DataObject) -> None:
    experts, width, slots = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    tokens, top_k = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 3))
    some = st.sampled_from([0] * 8 + [1, 2, 3, -1, 2**31 - 1])
    ids = np.array(data.draw(st.lists(some, min_size=tokens * top_k, max_size=tokens * top_k)), np.int64).reshape(tokens, top_k)
    replicas = np.array(data.draw(st.lists(some, min_size=experts * width, max_size=experts * width)), np.int32)
    kinds = {"rows": TensorProto.INT32, "offsets": TensorProto.INT32}
    sorted_pairs = answer("Dispatch", {"ids": ids, "replicas": replicas.reshape(experts, width)}, kinds, slots=slots)
    if sorted_pairs is None:
        return
    rows, offsets = sorted_pairs
    assert sorted(rows) == list(range(tokens * top_k))
    assert offsets[0] == 0
    assert offsets[-1] == tokens * top_k
    y = np.ones((near(data.draw, tokens * top_k), 5), np.float32)
    gates = np.ones((near(data.draw, tokens), top_k), np.float32)
    answer("Combine", {"y": y, "rows": rows, "gates": gates}, {"out": TensorProto.FLOAT})
