"""The ops of rq.moe in ONNX Runtime, compared with a float64 reference in numpy."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
import op_nodes
import pytest
from onnx import TensorProto
from op_nodes import GATED, assert_close, combine, dispatch, expert_gemm, pack, python_with, reference, routed, run_op

from rq_compile.architectures.geometry import Activation
from rq_compile.engine import library
from rq_compile.errors import UserError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_dispatch_splits_an_experts_arrivals_over_its_replicas(rng: np.random.Generator, top_k: int) -> None:
    replicas = [[0, 3, 5], [1, -1, -1], [2, 4, -1], [6, -1, -1]]
    ids = np.stack([rng.permutation(4)[:top_k] for _ in range(29)]).astype(np.int64)
    rows, offsets = dispatch(ids, replicas, 8)
    arrivals = [0] * 4
    expected: list[list[int]] = [[] for _ in range(8)]
    for pair, expert in enumerate(ids.ravel()):
        copies = [slot for slot in replicas[expert] if slot >= 0]
        expected[copies[arrivals[expert] % len(copies)]].append(pair)
        arrivals[expert] += 1
    assert rows.tolist() == [pair for pairs in expected for pair in pairs]
    assert np.diff(offsets).tolist() == [len(pairs) for pairs in expected]
    assert offsets[0] == 0


@pytest.mark.parametrize("float_type", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("columns", [300, 128, 48, 40, 37, 3])
@pytest.mark.parametrize("gather", [0, 1])
def test_every_format_in_one_layer(rng: np.random.Generator, float_type: Any, columns: int, gather: int) -> None:
    weights = pack(rng, [0, 1, 2, 3, 4, 5, 6, 0, 4, 6], 19, columns, float_type)
    rows, offsets = routed(rng, 23, 2, 10)
    x = rng.normal(size=(23 if gather else 46, columns)).astype(np.float32)
    assert_close(expert_gemm(x, rows, offsets, weights, gather=gather), reference(x, rows, offsets, weights, gather=gather))


@pytest.mark.parametrize("block", [16, 32, 48, 1024])
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_every_block(rng: np.random.Generator, block: int, tokens: int) -> None:
    weights = pack(rng, [1, 2, 3, 4, 5, 6], 70, 2 * block - 3, block=block)
    rows, offsets = np.arange(6 * tokens, dtype=np.int32), (np.arange(7) * tokens).astype(np.int32)
    x = rng.normal(size=(6 * tokens, 2 * block - 3)).astype(np.float32)
    assert_close(expert_gemm(x, rows, offsets, weights), reference(x, rows, offsets, weights))


@pytest.mark.parametrize("activation", ["none", *get_args(Activation)])
@pytest.mark.parametrize("biased", [False, True])
def test_every_activation(rng: np.random.Generator, activation: str, biased: bool) -> None:
    weights = pack(rng, [0, 1, 2, 3], 42, 32, gated=activation in GATED)
    bias = rng.normal(size=(4, 42)).astype(np.float32) if biased else None
    rows, offsets = routed(rng, 11, 2, 4)
    x = (rng.normal(size=(11, 32)) * 2).astype(np.float32)
    options: dict[str, Any] = {"activation": activation, "gather": 1, "alpha": 1.3, "limit": 2.5}
    assert_close(expert_gemm(x, rows, offsets, weights, bias, **options), reference(x, rows, offsets, weights, bias, **options))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 48, 49, 101])
@pytest.mark.parametrize("rows", [20, 105])  # one panel and a part; four, two, one and a part side by side
def test_all_tokens_on_one_slot(rng: np.random.Generator, tokens: int, rows: int) -> None:
    weights = pack(rng, [1, 2, 0, 3, 4, 5, 6], rows, 64)
    for slot in range(7):
        offsets = np.array([0] * (slot + 1) + [tokens] * (7 - slot), np.int32)
        pairs = np.arange(tokens, dtype=np.int32)
        x = rng.normal(size=(tokens, 64)).astype(np.float32)
        assert_close(expert_gemm(x, pairs, offsets, weights), reference(x, pairs, offsets, weights))


@pytest.mark.parametrize("activation_bits", [8, 32])
def test_slots_may_share_weights(rng: np.random.Generator, activation_bits: int) -> None:
    own = pack(rng, [0, 1, 2, 1, 3, 3], 20, 48)
    rows, offsets = routed(rng, 40, 2, 8)
    x = rng.normal(size=(80, 48)).astype(np.float32)
    formats, places, slots = [1, 0, 2, 1, 1, 0, 3, 3], [1, 0, 0, 0, 1, 0, 1, 0], [3, 0, 2, 1, 3, 0, 5, 4]
    shared = expert_gemm(x, rows, offsets, own, formats=formats, weights=places, activation_bits=activation_bits)
    for slot, same in enumerate(slots):
        here = slice(offsets[slot], offsets[slot + 1])
        count = offsets[slot + 1] - offsets[slot]
        only = np.array([0] * (same + 1) + [count] * (6 - same), np.int32)
        alone = expert_gemm(x[here], np.arange(count, dtype=np.int32), only, own, activation_bits=activation_bits)
        assert shared[here].tobytes() == alone.tobytes()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("formats", [[0], [1], [2], [0, 2], [2, 1], [2, 0, 1]])
def test_nodes_of_version_1_give_the_same(rng: np.random.Generator, formats: list[int], bias: bool) -> None:
    """These keep a place for each group, empty where no slot is in it; engines have such nodes for years."""
    weights = pack(rng, formats, 24, 48)
    rows, offsets = routed(rng, 9, 2, len(formats))
    x = rng.normal(size=(9, 48)).astype(np.float32)
    biases = rng.normal(size=(len(formats), 24)).astype(np.float32) if bias else None
    first, second = (expert_gemm(x, rows, offsets, weights, biases, gather=1, version=version) for version in (1, 2))
    assert first.tobytes() == second.tobytes()
    assert_close(second, reference(x, rows, offsets, weights, biases, gather=1))


def test_more_inputs_than_the_formats_need_are_refused(rng: np.random.Generator) -> None:
    weights = pack(rng, [1], 24, 48)
    x, rows, offsets = np.ones((2, 48), np.float32), np.arange(2, dtype=np.int32), np.array([0, 2], np.int32)
    inputs = {"x": x, "rows": rows, "offsets": offsets, **weights.inputs, "bias": np.ones((1, 24), np.float32)}
    run_op("ExpertGemm", inputs, {"y": TensorProto.FLOAT}, formats=[1], outputs=24)
    with pytest.raises(Exception, match="there are more inputs than the slots' formats and a bias"):
        run_op("ExpertGemm", inputs | {"more": np.ones(3, np.float32)}, {"y": TensorProto.FLOAT}, formats=[1], outputs=24)


def test_no_tokens(rng: np.random.Generator) -> None:
    rows, offsets = dispatch(np.zeros((0, 2), np.int64), [[0], [1]], 2)
    assert rows.shape == (0,)
    assert offsets.tolist() == [0, 0, 0]
    weights = pack(rng, [0, 1], 12, 16, gated=True)
    y = expert_gemm(np.zeros((0, 16), np.float32), rows, offsets, weights, activation="swiglu", gather=1)
    assert y.shape == (0, 6)
    assert combine(y, rows, np.zeros((0, 2), np.float32)).shape == (0, 6)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_combine(rng: np.random.Generator, top_k: int) -> None:
    y = rng.normal(size=(17 * top_k, 33)).astype(np.float32)
    rows = rng.permutation(17 * top_k).astype(np.int32)
    gates = rng.uniform(size=(17, top_k)).astype(np.float32)
    exact = np.zeros((17, 33))
    for i, pair in enumerate(rows):
        exact[pair // top_k] += float(gates[pair // top_k, pair % top_k]) * y[i].astype(np.float64)
    assert_close(combine(y, rows, gates), exact)


@pytest.mark.parametrize("activation_bits", [8, 32])
@pytest.mark.parametrize("float_type", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_threads_and_batch_mates_do_not_change_a_bit(rng: np.random.Generator, float_type: Any, activation_bits: int) -> None:
    weights = pack(rng, [0, 1, 2, 5, 6], 70, 300, float_type, gated=True)
    rows, offsets = routed(rng, 60, 2, 5)
    x = rng.normal(size=(120, 300)).astype(np.float32)
    options: dict[str, Any] = {"activation": "swiglu", "activation_bits": activation_bits}
    one = expert_gemm(x, rows, offsets, weights, **options)
    two = expert_gemm(x, rows, offsets, weights, **options, threads=2)
    assert one.tobytes() == two.tobytes()
    for slot, count in itertools.product(range(5), (1, 2, 3, 4, 5, 7, 8, 9, 13)):  # few rows read several panels side by side
        here = slice(offsets[slot], offsets[slot] + count)
        alone = np.array([0] * (slot + 1) + [count] * (5 - slot), np.int32)
        few = expert_gemm(x[here], np.arange(count, dtype=np.int32), alone, weights, **options)
        assert few.tobytes() == one[here].tobytes()


def test_threads_do_not_change_a_bit_of_combine(rng: np.random.Generator) -> None:
    y = rng.normal(size=(120, 70)).astype(np.float32)
    rows, gates = rng.permutation(120).astype(np.int32), rng.uniform(size=(60, 2)).astype(np.float32)
    assert combine(y, rows, gates).tobytes() == combine(y, rows, gates, threads=2).tobytes()


@pytest.mark.parametrize("held", [120, 90])  # rows of y: of all pairs, or without those of constant experts at the end
def test_combine_takes_the_outputs_of_constant_experts(rng: np.random.Generator, held: int) -> None:
    ids = rng.integers(0, 5, (60, 2))
    ids.reshape(-1)[rng.permutation(120)[:30]] = 5
    places = np.array([-1, -1, -1, -1, -1, 1], np.int32)
    constant = np.flatnonzero(ids.reshape(-1) == 5)
    rows = np.concatenate([rng.permutation(np.setdiff1d(np.arange(120), constant)), constant]).astype(np.int32)
    y, outputs = (rng.normal(size=(count, 70)).astype(np.float32) for count in (120, 2))
    gates = rng.uniform(size=(60, 2)).astype(np.float32)
    by_pair = np.zeros((120, 70))
    by_pair[rows] = y
    by_pair[constant] = outputs[1]
    expected = (by_pair.reshape(60, 2, 70) * gates[..., None]).sum(1)
    inputs: dict[str, Any] = {"y": y[:held], "rows": rows, "gates": gates, "ids": ids, "places": places, "outputs": outputs}
    (found,) = run_op("Combine", inputs, {"out": TensorProto.FLOAT})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for change, message in (
        ({"y": y[:80]}, "has no output"),
        ({"ids": ids + 1}, "outside 0..5"),
        ({"places": places + 1}, "outputs has 2 rows"),
        ({"outputs": outputs[:, :60].copy()}, "60 columns"),
        ({"ids": ids.astype(np.int32)}, "other types"),
    ):
        with pytest.raises(Exception, match=message):
            run_op("Combine", inputs | change, {"out": TensorProto.FLOAT})


def test_nan_stays_in_its_row(rng: np.random.Generator) -> None:
    x = rng.normal(size=(8, 48)).astype(np.float32)
    x[3, 5] = np.nan
    for activation in ("none", "swiglu", "clamped_swiglu", "relu"):
        weights = pack(rng, [1, 2, 3], 16, 48, gated=activation in GATED)
        rows, offsets = np.arange(8, dtype=np.int32), np.array([0, 2, 5, 8], np.int32)
        y = expert_gemm(x, rows, offsets, weights, activation=activation)
        assert np.isnan(y[3]).all()
        assert np.isfinite(np.delete(y, 3, axis=0)).all()


@pytest.mark.parametrize(
    ("ids", "replicas", "message"),
    [
        ([[0, 2]], [[0], [1]], "expert id 2"),
        ([[0, -1]], [[0], [1]], "expert id -1"),
        ([[0, 1]], [[0], [-1]], "no slot"),
        ([[0, 1]], [[0], [7]], "slot 7"),
        ([[0, 1]], [[0], [-2]], "slot -2"),
    ],
)
def test_dispatch_refuses(ids: list[list[int]], replicas: list[list[int]], message: str) -> None:
    with pytest.raises(Exception, match=message):
        dispatch(np.array(ids, np.int64), replicas, 2)


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda inputs: inputs.update({name: None})


def _cut(name: str, *index: slice) -> Callable[[dict[str, Any]], None]:
    return lambda inputs: inputs.update({name: np.ascontiguousarray(inputs[name][index])})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda i: i.update(rows=np.array([0, 1, 2, 9], np.int32)), "outside 0..3"),
        (lambda i: i.update(rows=np.array([0, 1, 2, -1], np.int32)), "outside 0..3"),
        (lambda i: i.update(offsets=np.array([0, 3, 2, 4], np.int32)), "offsets fall"),
        (lambda i: i.update(offsets=np.array([0, 1, 2, 5], np.int32)), "offsets run"),
        (lambda i: i.update(offsets=np.array([0, 2, 4], np.int32)), "offsets has 3"),
        (lambda i: i.update(x=np.zeros((3, 32), np.float32)), "3 rows for 4 pairs"),
        (lambda i: i.update(x=np.zeros((4, 33), np.float32)), "columns"),
        (lambda i: i.update(x=np.zeros((1, 4, 32), np.float32)), "rank 3"),
        (lambda i: i.update(float_weights=np.zeros((1, 2, 32, 16), np.int32)), "element type"),
        # What follows is taken for one that is missing.
        (_without("float_weights"), "float_weights has element type 2, not float"),
        (_without("int8_packed"), "int8_packed has element type 1, not uint8"),
        (_without("int8_scales"), "int8_scales has element type 2, not float"),
        (_without("int4_scales"), "int4_scales is missing"),
        (_cut("int8_packed", slice(None), slice(0, 1)), "int8_packed has 1 panels"),
        (_cut("int8_packed", slice(None), slice(None), slice(None), slice(0, 32)), "groups of 32 bytes"),
        (_cut("int4_packed", slice(None), slice(None), slice(0, 3)), "int4_packed has blocks of 24"),
        (_cut("int4_scales", slice(None), slice(0, 1)), "other slots or panels"),
        (_cut("float_weights", slice(None), slice(None), slice(None), slice(0, 8)), "panels of 8 rows"),
        (_cut("float_weights", slice(None), slice(None), slice(0, 31)), "31 columns, x 32"),
        (
            lambda i: i.update(int8_scales=np.ones((1, 2, 2, 16), np.float32)),
            "int4_packed has blocks of 32, the group before it of 16",
        ),
        (lambda i: i.update(int8_scales=np.ones((1, 2, 16, 16), np.float32)), "blocks of 2, not a multiple of 16"),
        (lambda i: i.update(bias=np.zeros((3, 23), np.float32)), "bias must be"),
    ],
)
def test_expert_gemm_refuses(rng: np.random.Generator, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    weights = pack(rng, [0, 1, 2], 24, 32)
    inputs: dict[str, Any] = {
        "x": np.ones((4, 32), np.float32),
        "rows": np.arange(4, dtype=np.int32),
        "offsets": np.array([0, 1, 2, 4], np.int32),
    }
    inputs |= weights.inputs | {"bias": None}
    run_op("ExpertGemm", inputs, {"y": TensorProto.FLOAT}, formats=[0, 1, 2], outputs=24)
    damage(inputs)
    with pytest.raises(Exception, match=message):
        run_op("ExpertGemm", inputs, {"y": TensorProto.FLOAT}, formats=[0, 1, 2], outputs=24)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"activation": "mish"}, "unknown activation 'mish'"),
        ({"formats": [0, 9]}, "holds 9"),
        ({"outputs": 0}, "outputs is 0"),
        ({"outputs": 17}, "not 2"),
        ({"activation": "swiglu"}, "not 2"),
        ({"activation_bits": 16}, "activation_bits is 16"),
        ({"weights": [0]}, "weights has 1 entries for 2 slots"),
        ({"weights": [0, -1]}, "weights holds -1"),
        ({"weights": [0, 2]}, "the slots need 3"),
    ],
)
def test_expert_gemm_refuses_attributes(rng: np.random.Generator, attributes: dict[str, Any], message: str) -> None:
    weights = pack(rng, [0, 0], 8, 16)
    inputs: dict[str, Any] = {
        "x": np.ones((1, 16), np.float32),
        "rows": np.zeros(1, np.int32),
        "offsets": np.array([0, 1, 1], np.int32),
    }
    given: dict[str, Any] = {"formats": [0, 0], "outputs": 8} | attributes
    with pytest.raises(Exception, match=message):
        run_op("ExpertGemm", inputs | weights.inputs, {"y": TensorProto.FLOAT}, **given)


@pytest.mark.parametrize(
    ("rows", "tokens", "message"), [([0, 0], 2, "not a permutation"), ([0, 2], 2, "not a permutation"), ([0, 1], 3, "gates ask")]
)
def test_combine_refuses(rows: list[int], tokens: int, message: str) -> None:
    with pytest.raises(Exception, match=message):
        combine(np.ones((2, 4), np.float32), np.array(rows, np.int32), np.ones((tokens, 1), np.float32))


def lesser_instruction_sets() -> list[str]:
    """The sets of kernels that this processor supports, except the best one."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.is_file() else set()
    return ["plain", *(["avx2"] if "avx512dq" in flags else []), *(["avx512"] if "avx512_vnni" in flags else [])]


@pytest.mark.parametrize("isa", lesser_instruction_sets())
def test_lesser_instruction_sets(isa: str | None) -> None:
    """The same tests with the kernels that are not the default on this processor."""
    files = [__file__, __file__.replace("test_ops", "test_activation_bits")]
    chosen = "every_format or all_tokens_on_one_slot or batch_mates"
    result = python_with(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen)
    assert result.returncode == 0, result.stdout[-3000:]


def test_missing_library_is_a_user_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library.rq_compile, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match=r"librq_moe\.so is missing"):
        library.library_path()


AFTER_A_SESSION = """
import ctypes, os
import numpy as np
from op_nodes import combine
from rq_compile.engine.library import library_path
combine(np.ones((1, 4), np.float32), np.zeros(1, np.int32), np.ones((1, 1), np.float32))
ctypes.CDLL(str(library_path()), mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a library that stays is a choice of Linux's linker")
def test_the_library_stays_loaded_when_its_session_ends() -> None:
    """The next session would check the kernels again."""
    result = python_with(None, "-c", AFTER_A_SESSION)
    assert result.returncode == 0, result.stderr


def test_old_runtime_is_refused_politely() -> None:
    expected = "librq_moe.so needs ONNX Runtime 1.17 or newer, this is 1.2.3; upgrade onnxruntime"
    assert op_nodes.registered_with_an_old_runtime(library.library_path()) == expected
