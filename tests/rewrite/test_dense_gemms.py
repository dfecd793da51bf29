"""Non-expert weights as stored, in int8 or in int4: the op compared with float64, engines compared with transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import tiny
import torch
from one_layer import one_layer
from onnx import TensorProto
from op_nodes import Weights, assert_close, pack, reference, run_op
from plans import plan_of, unchanged

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.engine.manifest import Manifest
from rq_compile.export.export import export_graph
from rq_compile.lowerings import Native
from rq_compile.planning.schema import Slot
from rq_compile.quantization.formats import DenseFormat, Format
from rq_compile.quantization.quantizer import stored
from rq_compile.rewrite.dense_gemms import DenseWeights, dense_gemms
from rq_compile.rewrite.embedding_tables import embedding_tables
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.rewrite import imported
from rq_compile.rewrite.weights import ExternalWeight, constant
from rq_compile.runtime.engine import Engine
from rq_compile.targets.onnxruntime import compile_engine

QUANTIZED: tuple[Format, ...] = ("int8", "int4")
FAMILIES = ["qwen2_moe", "deepseek_v2", "gpt_oss"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(12)


def dense_gemm(x: np.ndarray, packed: Weights, bias: np.ndarray | None = None, **options: Any) -> np.ndarray:
    inputs: dict[str, Any] = {"x": x, **packed.inputs, "bias": bias}
    attributes: dict[str, Any] = {"formats": packed.formats, "outputs": packed.outputs} | options
    return run_op("DenseGemm", inputs, {"y": TensorProto.FLOAT}, **attributes)[0]


@pytest.mark.parametrize("shape", [(48,), (1, 48), (7, 37), (2, 3, 128), (2, 3, 5, 40), (0, 48), (2, 0, 48)])
@pytest.mark.parametrize(
    ("format", "float_type"), [(0, np.float32), (0, np.float16), (0, ml_dtypes.bfloat16), (1, None), (2, None)]
)
def test_every_row_of_any_rank(rng: np.random.Generator, shape: tuple[int, ...], format: int, float_type: Any) -> None:
    weights = pack(rng, [format], 35, shape[-1], float_type or np.float32)
    bias = rng.normal(size=(1, 35)).astype(np.float32)
    x = rng.normal(size=shape).astype(np.float32)
    flat, count = x.reshape(-1, shape[-1]), x.size // shape[-1]
    expected = reference(flat, np.arange(count), [0, count], weights, bias).reshape(*shape[:-1], 35)
    y = dense_gemm(x, weights, bias)
    assert y.shape == expected.shape
    if y.size:
        assert_close(y, expected)


def side_by_side(matrices: Sequence[Weights]) -> dict[str, np.ndarray]:
    """The panels of several matrices of one format, those of one after those of another."""
    given = [name for name, array in matrices[0].inputs.items() if array is not None]
    return {name: np.concatenate([matrix.inputs[name] for matrix in matrices], axis=1) for name in given}


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rows", [(16, 48, 7), (35, 1), (160, 160, 160), (5,)])
@pytest.mark.parametrize("shape", [(1, 1, 40), (3, 130), (2, 70, 300), (0, 48)])
@pytest.mark.parametrize(("format", "float_type"), [(0, np.float32), (0, ml_dtypes.bfloat16), (1, None), (2, None)])
def test_several_matrices_give_the_bits_of_each(
    rng: np.random.Generator, shape: tuple[int, ...], format: int, float_type: Any, rows: tuple[int, ...], bits: int
) -> None:
    matrices = [pack(rng, [format], count, shape[-1], float_type or np.float32) for count in rows]
    x = rng.normal(size=shape).astype(np.float32)
    results = {f"y{i}": TensorProto.FLOAT for i in range(len(rows))}
    inputs = {"x": x, **side_by_side(matrices)}
    found = run_op("DenseGemm", inputs, results, formats=[format], outputs=rows, activation_bits=bits)
    for y, matrix in zip(found, matrices, strict=True):
        np.testing.assert_array_equal(y, dense_gemm(x, matrix, activation_bits=bits))


@pytest.mark.parametrize("threads", [1, 2])
def test_large_matrices_are_shared_by_threads(rng: np.random.Generator, threads: int) -> None:
    matrices = [pack(rng, [1], count, 512) for count in (1000, 300, 17)]
    x = rng.normal(size=(2, 512)).astype(np.float32)
    results = dict.fromkeys("abc", TensorProto.FLOAT)
    found = run_op("DenseGemm", {"x": x, **side_by_side(matrices)}, results, threads, formats=[1], outputs=[1000, 300, 17])
    for y, matrix in zip(found, matrices, strict=True):
        assert_close(y, x @ matrix.exact[0].T)


@pytest.mark.parametrize("bits", [8, 32])
def test_a_row_is_the_same_alone_and_among_others(rng: np.random.Generator, bits: int) -> None:
    weights = pack(rng, [1], 40, 256)
    x = rng.normal(size=(65, 256)).astype(np.float32)
    together = dense_gemm(x, weights, activation_bits=bits)
    assert all((dense_gemm(x[i : i + 1], weights, activation_bits=bits)[0] == together[i]).all() for i in (0, 1, 31, 64))


def test_what_is_no_dense_matrix_is_refused(rng: np.random.Generator) -> None:
    x = np.zeros((2, 32), np.float32)
    with pytest.raises(Exception, match="formats has 2 entries"):
        dense_gemm(x, pack(rng, [1, 1], 16, 32))
    for outputs in ([16, 0], [-1]):
        with pytest.raises(Exception, match=f"attribute outputs is {outputs[-1]}, not a positive number of columns"):
            dense_gemm(x, pack(rng, [0], 16, 32), outputs=outputs)
    two: dict[str, Any] = {"x": x, **side_by_side([pack(rng, [0], 16, 32)] * 2)}
    bias = np.zeros((1, 32), np.float32)
    with pytest.raises(Exception, match="several matrices take no bias"):
        run_op("DenseGemm", two | {"bias": bias}, {"a": TensorProto.FLOAT, "b": TensorProto.FLOAT}, formats=[0], outputs=[16, 16])
    with pytest.raises(Exception, match="DenseGemm"):
        run_op("DenseGemm", two, {"a": TensorProto.FLOAT}, formats=[0], outputs=[16, 16])
    with pytest.raises(Exception, match="x is a scalar"):
        dense_gemm(np.array(1, np.float32), pack(rng, [0], 16, 32))
    with pytest.raises(Exception, match="x has rank 5, more than 4"):
        dense_gemm(np.zeros((1, 1, 1, 2, 32), np.float32), pack(rng, [0], 16, 32))
    with pytest.raises(Exception, match="float_weights has 32 columns, x 31"):
        dense_gemm(x[:, :31], pack(rng, [0], 16, 32))


@pytest.fixture(scope="module", params=FAMILIES)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, dict[str, Path]]:
    """A bf16 checkpoint, and its engine with the dense part in each format."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = Model.open(tiny.build(request.param, folder / "checkpoint", dtype=torch.bfloat16))
    exported = export_graph(checkpoint)
    plan = plan_of(checkpoint, lambda layer: [Slot(expert=slot.expert, format="bf16") for slot in unchanged(layer)])
    formats: tuple[DenseFormat, ...] = ("fp32", "stored", "int8", "int4")
    for format in formats:
        compile_engine(checkpoint, plan, folder / f"{format}.onnx", Native(dense_format=format), exported=exported)
    return checkpoint, {format: folder / f"{format}.onnx" for format in formats}


def logits(path: Path) -> np.ndarray:
    engine = Engine.load(path, threads=1)
    ids = np.random.default_rng(3).integers(4, tiny.VOCABULARY, (2, 9))
    return engine.logits(ids, decoder_input_ids=ids if engine.encoder_decoder else None)


def matrices(path: Path, ending: str) -> set[str]:
    """Parameters of the transformers model that are in the graph's initializers with this suffix."""
    names = [tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer]
    joined = [name.removesuffix(ending).split("+") for name in names if name.endswith(ending)]
    return {part.removesuffix(".transposed") for parts in joined for part in parts}


def test_kept_as_stored_nothing_is_lost(engines: tuple[Model, dict[str, Path]]) -> None:
    _, paths = engines
    np.testing.assert_allclose(logits(paths["stored"]), logits(paths["fp32"]), rtol=0, atol=1e-5)
    sizes = {format: Manifest.model_validate_json(path.with_suffix(".json").read_bytes()) for format, path in paths.items()}
    assert sizes["stored"].dense_format == "stored"
    assert sizes["int4"].dense_bytes < sizes["int8"].dense_bytes < sizes["stored"].dense_bytes < 0.7 * sizes["fp32"].dense_bytes


def test_every_product_is_counted(engines: tuple[Model, dict[str, Path]]) -> None:
    """Those that are read as stored or in int8, and the others by reason."""
    checkpoint, paths = engines
    shared_experts_gates = {"qwen2_moe": len(checkpoint.layers)}.get(checkpoint.model_type, 0)
    for format, how in (("stored", "as stored"), ("int8", "in int8"), ("int4", "in int4")):
        counts = Manifest.model_validate_json(paths[format].with_suffix(".json").read_bytes()).replaced
        graph = onnx.load(paths[format], load_external_data=False).graph
        gemms = [node for node in graph.node if node.op_type == "DenseGemm"]
        assert counts[f"dense products read {how}"] == sum(len(node.output) for node in gemms) > len(gemms)
        assert len({node.input[0] for node in gemms}) == len(gemms), "products of one tensor are one node"
        left = {name: count for name, count in counts.items() if name.startswith(f"dense products not read {how}")}
        reasons = {"they choose experts": len(checkpoint.layers), "1 rows": shared_experts_gates}
        assert left == {f"dense products not read {how}: {why}": count for why, count in reasons.items() if count}
        assert counts["embedding tables kept in 16 bit"] == 1
        tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
        assert [t.data_type for t in graph.initializer if t.name in tables and "embed" in t.name] == [TensorProto.BFLOAT16]


def test_a_product_with_a_factor_is_left_and_says_so() -> None:
    graph = imported(one_layer(32, 2))
    (experts,) = graph.nodes
    weight = constant(ExternalWeight("head", np.dtype(np.float16), (48, 32)))
    graph.outputs = [gs.Variable("z", np.float32, ["T", 48])]
    graph.nodes.append(gs.Node("Gemm", "head", {"alpha": 0.5, "transB": 1}, [experts.outputs[0], weight], graph.outputs))
    sections, report = dense_gemms(graph, "int8", DenseWeights(lambda _: np.dtype(np.float16), lambda _: np.zeros(0)))
    assert (sections, report.matches, report.changed) == ([], 1, 0)
    assert counts_of([report]) == {"dense products read in int8": 0, "dense products not read in int8: alpha 0.5": 1}


def test_a_table_that_is_a_matrix_too_is_left_and_says_so() -> None:
    """As a tied embedding whose product reads it as it stands."""
    table = constant(ExternalWeight("table", np.dtype(np.float32), (48, 32)))
    ids, x = gs.Variable("ids", np.int64, ["T"]), gs.Variable("x", np.float32, ["T", 48])
    rows, z = gs.Variable("rows", np.float32, ["T", 32]), gs.Variable("z", np.float32, ["T", 32])
    nodes = [gs.Node("Gather", "rows", {}, [table, ids], [rows]), gs.Node("MatMul", "product", {}, [x, table], [z])]
    graph = gs.Graph(nodes, [ids, x], [rows, z], opset=21)
    report = embedding_tables(graph, lambda _: np.dtype(np.float16))
    why = "embedding tables not kept in 16 bit: read by MatMul, too"
    assert counts_of([report]) == {"embedding tables kept in 16 bit": 0, why: 1}
    assert [node.op for node in graph.nodes] == ["Gather", "MatMul"]


@pytest.mark.parametrize("dense_format", ["int8", "int4"])
def test_rounded_it_is_the_model_with_rounded_matrices(engines: tuple[Model, dict[str, Path]], dense_format: Format) -> None:
    checkpoint, paths = engines
    formats = {name: format for format in QUANTIZED for name in matrices(paths[dense_format], f".{format}_packed")}
    assert formats.keys() == matrices(paths["stored"], ".panels")
    assert not [name for name in formats if "router" in name or name.endswith((".gate.weight", "embed_tokens.weight"))]
    others = {name for name, format in formats.items() if format != dense_format}
    assert others == ({"lm_head.weight"} if dense_format == "int4" else set())
    model = load_model(checkpoint)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert formats.keys() <= parameters.keys()
    for name, format in formats.items():
        parameters[name].data = torch.from_numpy(stored(parameters[name].numpy(), format))
    ids = torch.from_numpy(np.random.default_rng(3).integers(4, tiny.VOCABULARY, (2, 9)))
    arguments = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        expected = model(input_ids=ids, **arguments).logits.numpy()
    np.testing.assert_allclose(logits(paths[dense_format]), expected, rtol=0, atol=1e-4)


def test_an_fp32_checkpoint_is_left_to_onnxruntime(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Model.open(tiny_checkpoint("olmoe"))
    compile_engine(checkpoint, plan_of(checkpoint, unchanged), tmp_path / "model.onnx")
    assert not matrices(tmp_path / "model.onnx", ".panels")
