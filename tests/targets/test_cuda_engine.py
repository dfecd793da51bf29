"""``-o engine.onnx`` for the target cuda: every MoE layer is one node of librq_moe_cuda.so."""

import json
from pathlib import Path

import numpy as np
import onnx
import op_nodes
import pytest
import tiny
from command_line import Run, names, refused
from transformers import OlmoeConfig

from rq_compile.architectures.model import Model
from rq_compile.engine import library
from rq_compile.engine.library import OP_SET_VERSION
from rq_compile.errors import UserError
from rq_compile.files import read_document, write_document
from rq_compile.planning.schema import LayerPlan, Plan, Slot
from rq_compile.quantization.formats import Format
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.files import read_manifest
from rq_compile.targets.engine_estimate import engine_estimate

# Of sizes that the kernels support, unlike those of the other tests.
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_experts": 7}
SLOTS: list[tuple[int, Format]] = [
    (0, "fp32"), (1, "int8"), (2, "int4"), (3, "int3"), (4, "int2"), (0, "fp32"), (5, "constant"), (6, "int2"), (3, "int3"),
]  # fmt: skip
FORMATS = "int8,int4,int3,int2,constant"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, rq_compile: Run, export_once: object, stages: Path) -> Path:
    """A folder with a checkpoint, its calibration, a plan for cuda in every format, and the engine of both."""
    folder = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.CONFIGS, "olmoe", lambda: OlmoeConfig(**{**tiny.COMMON, **SIZES}))
        tiny.build("olmoe", folder / "model")
    text = ("--text", stages / "text.txt", "--sequence-length", 64)
    plan = ("--target", "cuda", "--policy", "uniform", "--option", "format=int8", "-o", folder / "plan.json")
    for command in (
        ("calibrate", folder / "model", *text, "--formats", FORMATS, "-o", folder / "calibration.json"),
        ("plan", folder / "calibration.json", *plan),
    ):
        result = rq_compile(*command, "-q")
        assert result.exit_code == 0, result.stderr
    made = read_document(Plan, folder / "plan.json")
    write_document(made.model_copy(update={"layers": list(map(in_every_format, made.layers))}), folder / "plan.json")
    result = rq_compile(folder / "model", "--plan", folder / "plan.json", "-o", folder / "engine.onnx", "-q")
    assert result.exit_code == 0, result.stderr
    return folder


def in_every_format(layer: LayerPlan) -> LayerPlan:
    return layer.model_copy(update={"slots": [Slot(expert=e, format=f) for e, f in SLOTS]})


def test_a_plan_for_cuda_becomes_an_engine_for_it(wide: Path) -> None:
    manifest = read_manifest(wide / "engine.onnx")
    assert (manifest.target, manifest.lowering, manifest.provider) == ("cuda", "cuda", "CUDAExecutionProvider")
    assert (manifest.op_library, manifest.op_library_name) == (OP_SET_VERSION, "librq_moe_cuda.so")
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
    assert estimate.outputs["engine.onnx"] == pytest.approx((wide / "engine.onnx").stat().st_size, rel=0.4)


def test_every_slot_takes_the_bytes_of_its_format(wide: Path) -> None:
    manifest, plan = read_manifest(wide / "engine.onnx"), read_document(Plan, wide / "plan.json")
    # The checkpoint is fp32, and the node computes in fp16.
    saved = sum(layer.geometry.expert_bytes("fp32") - layer.geometry.expert_bytes("fp16") for layer in plan.layers)
    assert manifest.expert_bytes == plan.stored_bytes - saved
    assert not [reason for reason in manifest.replaced if "held as" in reason]


@pytest.mark.parametrize("memory", [0.1])
def test_a_planned_budget_is_kept_and_shown(wide: Path, out: Path, rq_compile: Run, memory: float) -> None:
    options = ("--target", "cuda", "--policy", "random", "--memory", memory, "-o", out / "plan.json")
    assert rq_compile("plan", wide / "calibration.json", *options, "-q").exit_code == 0
    plan = read_document(Plan, out / "plan.json")
    assert {"int3", "int2"} & {slot.format for layer in plan.layers for slot in layer.slots}
    (out / "calibration.safetensors").symlink_to(wide / "calibration.safetensors")
    compiled = rq_compile(wide / "model", "--plan", out / "plan.json", "-o", out / "x.onnx")
    assert compiled.exit_code == 0, compiled.stderr
    assert "held as" not in compiled.stderr
    engine = read_manifest(out / "x.onnx")
    assert engine.expert_bytes == plan.bytes_after <= memory * plan.bytes_before
    shown = json.loads(rq_compile("inspect", out / "x.onnx", "--json").stdout)
    assert shown["expert_bytes"] == plan.bytes_after


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
