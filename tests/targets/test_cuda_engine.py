"""``-o engine.onnx`` for the target cuda: every MoE layer is one node of librq_moe_cuda.so."""

import json
from pathlib import Path

import numpy as np
import onnx
import op_nodes
import pytest
import tiny
from command_line import Run, names, refused
from one_layer import PREDICTION
from transformers import OlmoeConfig

from rq_compile.architectures.model import Model
from rq_compile.engine import library
from rq_compile.errors import UserError
from rq_compile.files import read_document, write_document
from rq_compile.planning.schema import LayerPlan, Plan, Slot
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.files import read_manifest
from rq_compile.targets.engine_estimate import engine_estimate

# Of sizes that the kernels support, unlike those of the other tests.
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_experts": 4}
SLOTS = [(0, "fp32"), (1, "int8"), (2, "int4"), (3, "int8"), (0, "fp32"), (2, "int4")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, rq_compile: Run, export_once: object) -> Path:
    """A folder with a checkpoint, a plan for cuda in every format, and the engine of both."""
    folder = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.CONFIGS, "olmoe", lambda: OlmoeConfig(**{**tiny.COMMON, **SIZES}))
        checkpoint = Model.open(tiny.build("olmoe", folder / "model"))
    write_document(plan_for(checkpoint), folder / "plan.json")
    result = rq_compile(folder / "model", "--plan", folder / "plan.json", "-o", folder / "engine.onnx", "-q")
    assert result.exit_code == 0, result.stderr
    return folder


def plan_for(checkpoint: Model) -> Plan:
    layers = [
        LayerPlan(
            name=layer.name,
            index=layer.index,
            geometry=layer.geometry,
            slots=[Slot(expert=e, format=f) for e, f in SLOTS],
            predicted=PREDICTION,
        )
        for layer in checkpoint.layers
    ]
    about = {"tool": "test", "model": "m", "model_type": "olmoe", "fingerprint": checkpoint.fingerprint, "policy": "none"}
    return Plan(**about, calibration_sha256=None, target="cuda", memory=1.0, layers=layers)


def test_a_plan_for_cuda_becomes_an_engine_for_it(wide: Path) -> None:
    manifest = read_manifest(wide / "engine.onnx")
    assert (manifest.target, manifest.lowering, manifest.provider) == ("cuda", "cuda", "CUDAExecutionProvider")
    assert (manifest.op_library, manifest.op_library_name) == (2, "librq_moe_cuda.so")
    assert manifest.activation_bits == 16
    assert manifest.replaced["float slots kept in fp16"] == 4
    model = onnx.load(wide / "engine.onnx", load_external_data=False)
    assert [(node.op_type, node.domain) for node in model.graph.node if node.domain] == [("MoeLayer", "rq.moe")] * 2
    assert {"engine.onnx", "engine.onnx.data", "engine.json", "engine.tokenizer.json"} <= set(names(wide))


def test_it_takes_what_was_estimated(wide: Path) -> None:
    """The size of the weights is exact, except for the alignment at the end."""
    checkpoint, plan = Model.open(wide / "model"), read_document(Plan, wide / "plan.json")
    estimate = engine_estimate(checkpoint, wide / "engine.onnx", "cuda", plan=plan)
    assert 0 <= estimate.outputs["engine.onnx.data"] - (wide / "engine.onnx.data").stat().st_size < 4096
    assert estimate.outputs["engine.onnx"] == pytest.approx((wide / "engine.onnx").stat().st_size, rel=0.3)


def test_onnxruntime_takes_the_graph_and_misses_only_cuda(wide: Path, cuda_ops: Path) -> None:
    manifest = read_manifest(wide / "engine.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "library_path", lambda name: cuda_ops)
        engine = Engine(wide / "engine.onnx", manifest.model_copy(update={"provider": "CPUExecutionProvider"}), 1)
        with pytest.raises(UserError, match=r"Could not find an implementation for MoeLayer\(1\)"):
            engine.logits(np.array([[5, 6]]))


def test_its_answers_are_those_of_the_native_engine(
    wide: Path,
    cuda_ops: Path,
    cuda_parts: dict[str, str],
    built_kernels: Path,
    rq_compile: Run,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a separate Python process, since Triton decides at import whether it interprets."""
    arguments = [wide / "model", "--plan", wide / "plan.json", "--lowering", "native", "-o", out / "native.onnx"]
    result = rq_compile(*arguments, "-q")
    assert result.exit_code == 0, result.stderr
    native = Engine.load(out / "native.onnx", threads=1)
    np.save(out / "logits.npy", native.logits(np.random.default_rng(0).integers(4, 99, (2, 9))))
    places = {"RQ_LIBRARY": cuda_ops, "RQ_KERNELS": built_kernels, "RQ_ENGINE": wide / "engine.onnx", "RQ_MODEL": wide / "model"}
    for name, value in {**cuda_parts, **places, "RQ_NATIVE": out / "logits.npy", "TRITON_INTERPRET": 1}.items():
        monkeypatch.setenv(name, str(value))
    words = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", "interpreted_cuda_engine.py"]
    checked = op_nodes.python_with(None, *words)
    assert checked.returncode == 0, checked.stdout[-5000:] + checked.stderr[-2000:]


def test_without_cuda_it_is_refused_in_a_sentence(wide: Path, rq_compile: Run) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    result = rq_compile("generate", wide / "engine.onnx", "--prompt", "ab", "-q")
    refused(result, 2, "engine.onnx needs CUDAExecutionProvider, which ONNX Runtime", "install onnxruntime-gpu")


def test_its_rows_are_not_counted(wide: Path) -> None:
    engine = Engine(wide / "engine.onnx", read_manifest(wide / "engine.onnx"), 1)
    with pytest.raises(UserError, match="does not count the rows of its slots"):
        engine.loads(np.array([[5, 6]]))


@pytest.mark.parametrize("destination", ["edge", "triton", "onnxruntime-genai"])
def test_packages_are_for_the_cpu(wide: Path, out: Path, rq_compile: Run, destination: str) -> None:
    result = rq_compile("package", wide / "engine.onnx", "--for", destination, "-o", out / "package", "-q")
    refused(result, 2, "engine.onnx is for CUDAExecutionProvider, but packages are for the CPU")
    assert names(out) == []


@pytest.mark.parametrize("options", [["--activation-bits", "8"], ["--dense-format", "int8"]])
def test_options_of_other_lowerings_are_refused(wide: Path, out: Path, rq_compile: Run, options: list[str]) -> None:
    for lowering in ([], ["--lowering", "cuda"]):
        result = rq_compile(wide / "model", "--plan", wide / "plan.json", *lowering, *options, "-o", out / "x.onnx", "-q")
        chosen = [] if lowering else ["plan.json for cuda chooses", "leave it out, or give --lowering native"]
        refused(result, 2, f"{options[0]} ", "has no effect with --lowering cuda", *chosen)


def test_sizes_that_the_kernels_do_not_take_are_refused_before_any_export(
    model: Path, stages: Path, out: Path, rq_compile: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = json.loads((stages / "plan.json").read_text())
    plan["target"], plan["statistics"], plan["quantizer"] = "cuda", None, "nearest"
    (out / "plan.json").write_text(json.dumps(plan))
    for more in ([], ["--dry-run"]):
        result = rq_compile(model, "--plan", out / "plan.json", "-o", out / "x.onnx", "-q", *more)
        refused(result, 2, "layer 0 has hidden 32 and thus int", "but the GPU kernels need multiples of 64", "--lowering native")
    assert names(out) == ["plan.json"]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library.rq_compile, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match=r"librq_moe_cuda\.so is missing; build it as plugins/cuda/README\.md says"):
        library.library_path(library.CUDA_LIBRARY)
