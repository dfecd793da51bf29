"""``-o engine.plan --plugins``: the network whose MoE layers are plugins, and the other files for its builder."""

import json
import re
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import tiny
import torch
from command_line import names, refused
from moe_nodes import attributes_of, constants_of, inputs_of, moe_nodes, run
from onnx import TensorProto
from rows import with_all_rows
from transformers import OlmoeConfig

from rq_compile.architectures.model import Model
from rq_compile.export.exported import Exported
from rq_compile.files import read_document, write_document
from rq_compile.lowerings import Plugins
from rq_compile.planning.schema import LayerPlan, Plan
from rq_compile.quantization.formats import FEW_BITS, Format
from rq_compile.quantization.quantizer import stored
from rq_compile.rewrite.rewrite import imported
from rq_compile.runtime.reference import Reference
from rq_compile.schemas import schema
from rq_compile.targets.tensorrt import build_engine
from rq_compile.targets.tensorrt import compile as target
from rq_compile.targets.tensorrt.half_precision import router_nodes
from rq_compile.targets.tensorrt.manifest import TensorRTManifest
from rq_compile.targets.tensorrt.network import write_network
from rq_compile.targets.tensorrt.profiles import default_profiles

PROFILES = default_profiles(2, 16, 64)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that looks like the plugin library as long as it is not loaded."""
    path = tmp_path_factory.mktemp("library") / "librq_tensorrt.so"
    path.write_bytes(b"\x7fELF ... getCreators ... MoeLayer ... rq.moe")
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, rq_compile: Callable, stages: Path) -> tuple[Model, Path]:
    """An OLMoE of sizes that the kernels support, unlike those of the other tests, and its plan: replicas, int8 to int2."""
    folder = tmp_path_factory.mktemp("wide")
    model, calibration, plan = folder / "model", folder / "calibration.json", folder / "plan.json"
    config = OlmoeConfig(**tiny.COMMON | {"hidden_size": 64, "intermediate_size": 64}, num_experts=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.CONFIGS, "olmoe", lambda: config)
        tiny.build("olmoe", model)
    for command in (
        ("calibrate", model, "--text", stages / "text.txt", "--sequence-length", 64, "-o", calibration),
        ("plan", calibration, "--target", "tensorrt", "--memory", 0.2, "-o", plan),
    ):
        result = rq_compile(*command, "-q")
        assert result.exit_code == 0, result.stderr
    made = read_document(Plan, plan)
    write_document(made.model_copy(update={"layers": [with_copies(with_few_bits(layer), 3) for layer in made.layers]}), plan)
    return Model.open(model), plan


def with_few_bits(layer: LayerPlan) -> LayerPlan:
    """The last two slots in int3 and int2."""
    slots = [*layer.slots[:-2], *(s.model_copy(update={"format": f}) for s, f in zip(layer.slots[-2:], FEW_BITS, strict=True))]
    return layer.model_copy(update={"slots": slots})


def with_copies(layer: LayerPlan, count: int) -> LayerPlan:
    """Replicas of the first ``count`` slots, which share the load with them."""
    halved = [slot.model_copy(update={"load": (slot.load or 0) / 2}) for slot in layer.slots[:count]]
    return layer.model_copy(update={"slots": [*halved, *layer.slots[count:], *halved]})


@pytest.fixture(scope="module")
def network(
    wide: tuple[Model, Path], export_once: Callable[[Model], Exported], tmp_path_factory: pytest.TempPathFactory
) -> tuple[onnx.ModelProto, Plan]:
    """Without the calibration's statistics: rounded to the nearest."""
    checkpoint, plan = wide[0], read_document(Plan, wide[1])
    file = tmp_path_factory.mktemp("network") / "n.onnx"
    write_network(checkpoint, plan, export_once(checkpoint), Plugins(), file)
    onnx.checker.check_model(str(file), full_check=True)
    return onnx.load(file), plan


def as_planned(reference: Reference, plan: Plan) -> Reference:
    """With the weights of every expert as its slots hold them."""
    for layer in plan.layers:
        experts = reference.model.get_submodule(layer.name)
        for slot in layer.slots:
            for weights in (experts.gate_up_proj, experts.down_proj):
                held = stored(weights.data[slot.expert].numpy().copy(), slot.format)
                weights.data[slot.expert] = torch.from_numpy(held)
    return reference


def test_a_model_gives_the_logits_of_transformers(wide: tuple[Model, Path], network: tuple[onnx.ModelProto, Plan]) -> None:
    model, plan = network
    slots = [slot for layer in plan.layers for slot in layer.slots]
    assert {"int8", "int4", "int3", "int2"} <= {slot.format for slot in slots}
    assert len(slots) == 2 * (8 + 3)
    ids = np.random.default_rng(0).integers(4, 99, (3, 40))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(40), (3, 1))}
    for value in model.graph.input:
        if value.name.startswith("past"):
            heads, dimension = (value.type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
            feeds[value.name] = np.zeros((3, heads, 0, dimension), np.float16)
    logits = run(with_all_rows(model), feeds)["logits"]
    wanted = as_planned(Reference.load(wide[0]), plan).logits(ids)
    assert logits.dtype == np.float32
    # A token whose experts' scores differ only by rounding may go to a different expert.
    assert np.quantile(np.abs(logits - wanted).max(-1), 0.9) < 0.01 * np.abs(wanted).max()
    assert (logits.argmax(-1) == wanted.argmax(-1)).mean() > 0.97


def test_a_layer_keeps_its_types_and_the_router_stays_in_fp32(
    wide: tuple[Model, Path], network: tuple[onnx.ModelProto, Plan], export_once: Callable[[Model], Exported]
) -> None:
    model, plan = network
    assert len(moe_nodes(model)) == len(plan.layers) == 2
    assert not {"Loop", "DequantizeLinear", "ScatterND"} & {node.op_type for node in model.graph.node}
    typed = onnx.shape_inference.infer_shapes(model)
    known = {v.name: v.type.tensor_type.elem_type for v in (*typed.graph.value_info, *typed.graph.input, *typed.graph.output)}
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    for node in moe_nodes(model):
        assert [known[name] for name in node.input[:3]] == [half, TensorProto.INT64, single]
        held = {name: constants_of(model)[tensor].dtype for name, tensor in inputs_of(node).items() if "scales" in name}
        assert set(held.values()) == {np.dtype(np.float32)}
        (after,) = (other for other in model.graph.node if node.output[0] in other.input)
        assert (after.op_type, attributes_of(after)["to"]) == ("Cast", half)  # and on in 16 bit
    router = router_nodes(imported(export_once(wide[0]).model))
    for node in model.graph.node:
        if node.name in router:
            assert half not in [known.get(name) for name in (*node.input, *node.output)]


def test_bf16(wide: tuple[Model, Path], export_once: Callable[[Model], Exported], tmp_path: Path) -> None:
    checkpoint, path = wide
    plan = read_document(Plan, path)
    write_network(checkpoint, plan, export_once(checkpoint), Plugins("bf16"), tmp_path / "n.onnx", precision="bf16")
    onnx.checker.check_model(str(tmp_path / "n.onnx"), full_check=True)


@pytest.fixture(scope="module")
def unbuilt(
    wide: tuple[Model, Path],
    library: Path,
    rq_compile: Callable,
    export_once: Callable[[Model], Exported],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    checkpoint, plan = wide
    folder = tmp_path_factory.mktemp("unbuilt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "export_graph", export_once)
        result = rq_compile(checkpoint.path, "--plan", plan, "-o", folder / "m.plan", "--no-build", "--plugins", library)
    assert result.exit_code == 0, result.stderr
    assert "standard ops" not in result.stderr
    return folder


def test_what_a_builder_needs_is_written(unbuilt: Path, library: Path, rq_compile: Callable) -> None:
    files = "build.json build.py build.sh context.onnx json network.onnx network.onnx.data plugins.so tokenizer.json"
    assert names(unbuilt) == [f"m.{name}" for name in files.split()]
    assert (unbuilt / "m.plugins.so").read_bytes() == library.read_bytes()
    manifest = read_document(TensorRTManifest, unbuilt / "m.json")
    jsonschema.validate(json.loads((unbuilt / "m.json").read_text()), json.loads(schema("tensorrt-engine")))
    assert (manifest.lowering, manifest.files["plugins"].name) == ("plugins", "m.plugins.so")
    assert json.loads((unbuilt / "m.build.json").read_text())["plugins"] == "m.plugins.so"
    assert moe_nodes(onnx.load(unbuilt / "m.network.onnx", load_external_data=False))
    line = (unbuilt / "m.build.sh").read_text()
    assert "--dynamicPlugins=./m.plugins.so" in line
    assert "--setPluginsToSerialize=./m.plugins.so" in line
    assert subprocess.run(["sh", "-n"], input=line, text=True, check=False).returncode == 0
    shown = rq_compile("inspect", unbuilt / "m.plan", "--verify")
    assert shown.exit_code == 0, shown.stderr
    assert re.search(r"moe layers\s+plugins", shown.stdout)


def test_the_loads_that_were_planned_for_are_told(unbuilt: Path) -> None:
    model = onnx.load(unbuilt / "m.network.onnx", load_external_data=False)
    plan = read_document(TensorRTManifest, unbuilt / "m.json").plan
    for node, layer in zip(moe_nodes(model), plan.layers, strict=True):
        np.testing.assert_allclose(attributes_of(node)["shares"], [slot.load or 0 for slot in layer.slots], rtol=1e-6)


def test_without_plugins_it_is_said_and_with_stock_it_is_not(
    wide: tuple[Model, Path], rq_compile: Callable, export_once: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "export_graph", export_once)
    checkpoint, plan = wide
    arguments = (checkpoint.path, "--plan", plan, "-o", out / "m.plan", "--no-build")
    for options, said in (([], True), (["--stock"], False)):
        result = rq_compile(*arguments, *options)
        assert result.exit_code == 0, result.stderr
        assert ("--plugins librq_tensorrt.so" in result.stderr) == said
        assert read_document(TensorRTManifest, out / "m.json").lowering == "batched"
        assert json.loads((out / "m.build.json").read_text())["plugins"] is None
        assert "Plugins" not in (out / "m.build.sh").read_text()


@pytest.mark.parametrize("plugins", [False, True])
@pytest.mark.parametrize(("format", "said"), [("int3", True), ("int2", True), ("int4", False), ("int8", False)])
def test_slots_that_standard_ops_hold_in_more_bits_are_told(
    wide: tuple[Model, Path], library: Path, plugins: bool, format: Format, said: bool
) -> None:
    checkpoint, plan = wide[0], read_document(Plan, wide[1])
    layers = []
    for layer in plan.layers:
        slots = [slot.model_copy(update={"format": format}) for slot in layer.slots]
        taken = {"bytes_after": len(slots) * layer.geometry.expert_bytes(format)}
        layers.append(layer.model_copy(update={"slots": slots, "predicted": layer.predicted.model_copy(update=taken)}))
    settings = target.Settings("tensorrt", PROFILES, plugins=library if plugins else None)
    remarks = " ".join(target.remarks_before(checkpoint, plan.model_copy(update={"layers": layers}), settings))
    assert (f"With --stock, there are 22 {format} slots held as int4: " in remarks) == (said and not plugins)
    assert (", which --plugins LIBRARY keeps." in remarks) == (said and not plugins)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--plugins", "{library}", "--builder", "rtx", "--sm", "89"],
            ["--builder rtx does not support plugins", "--builder tensorrt"],
        ),
        (["--plugins", "{library}", "--stock"], ["--stock and --plugins exclude each other"]),
        (["--plugins", "nowhere.so"], ["cannot read the plugin library nowhere.so", "plugins/tensorrt/README.md"]),
        (["--plugins", "{text}"], ["is not a library of the plugin MoeLayer"]),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    options: list[str], words: list[str], rq_compile: Callable, library: Path, model: Path, stages: Path, out: Path
) -> None:
    given = [option.format(library=library, text=stages / "text.txt") for option in options]
    refused(rq_compile(model, "--text", stages / "text.txt", "-o", out / "m.plan", "--no-build", *given), 2, *words)
    assert names(out) == []


def test_plugins_have_no_effect_on_onnx(rq_compile: Callable, model: Path, stages: Path, library: Path, out: Path) -> None:
    result = rq_compile(model, "--plan", stages / "plan.json", "-o", out / "m.onnx", "--plugins", library)
    refused(result, 2, "--plugins has no effect", ".plan")


def test_sizes_that_no_kernel_takes_are_named(rq_compile: Callable, model: Path, stages: Path, library: Path, out: Path) -> None:
    """This fails before the model is exported, which takes minutes for a large model."""
    arguments = (model, "--plan", stages / "plan.json", "-o", out / "m.plan", "--no-build", "--plugins", library)
    result = rq_compile(*arguments)
    assert result.exit_code == 2
    for words in ("layer 0 has hidden 32", "blocks of 32", "multiples of 64", "--stock"):
        assert words in result.stderr
    assert names(out) == []
    plan = read_document(Plan, stages / "plan.json")
    (first, *_) = plan.layers
    plain = [slot.model_copy(update={"format": "fp16"}) for slot in first.slots]
    settings = target.Settings("tensorrt", (), build=False, plugins=library)
    target.check_layer(first.model_copy(update={"slots": plain}), settings)
    odd = first.geometry.model_copy(update={"intermediate": 40})
    with pytest.raises(target.UserError, match="layer 0 has intermediate 40, but the GPU kernels need multiples of 16"):
        target.check_layer(first.model_copy(update={"slots": plain, "geometry": odd}), settings)


def test_an_encoder_decoder_is_refused_at_once(
    rq_compile: Callable, tiny_checkpoint: Callable[[str], Path], stages: Path, out: Path
) -> None:
    switch = tiny_checkpoint("switch_transformers")
    result = rq_compile(switch, "--text", stages / "text.txt", "-o", out / "m.plan", "--no-build")
    refused(result, 2, "is an encoder-decoder, which the TensorRT targets do not support", ".onnx")


class Recorded:
    """Replaces the module ``tensorrt``: records the calls, in their order."""

    __name__, __version__ = "tensorrt", "10.16.1"

    def __init__(self, loads: bool = True) -> None:
        self.calls: list[tuple[str, object]] = []
        self.config = types.SimpleNamespace(
            clear_flag=lambda _: None, add_optimization_profile=lambda _: None, plugins_to_serialize=[]
        )
        self.ILogger = type("ILogger", (), {"__init__": lambda _: None, "ERROR": 1})
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        self.ProfilingVerbosity = types.SimpleNamespace(DETAILED=2)
        self.BuilderFlag = types.SimpleNamespace(TF32=0)
        self.Builder = lambda logger: types.SimpleNamespace(
            get_plugin_registry=lambda: types.SimpleNamespace(load_library=self._library(logger, loads)),
            create_network=lambda _: types.SimpleNamespace(num_inputs=0, num_layers=0),
            create_builder_config=lambda: self.config,
            build_serialized_network=self._build,
        )
        self.OnnxParser = lambda *_: types.SimpleNamespace(parse_from_file=self._parse)

    def _library(self, logger: Any, loads: bool) -> Callable[[str], object]:
        def load(path: str) -> object:
            self.calls.append(("library", path))
            if not loads:
                logger.log(1, "it is for another TensorRT\nand more")
            return object() if loads else None

        return load

    def _parse(self, path: str) -> bool:
        self.calls.append(("network", path))
        return True

    def _build(self, *_: object) -> memoryview:
        self.calls.append(("build", list(self.config.plugins_to_serialize)))
        return memoryview(b"engine")


SETTINGS = {
    "network": "n.onnx", "engine": "n.plan", "builder": "tensorrt", "plugins": "n.plugins.so", "compute_capabilities": [],
    "profiles": [],
}  # fmt: skip


def test_the_library_is_loaded_before_the_network_and_put_into_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks only our side: TensorRT was not available to check the calls."""
    recorded = Recorded()
    monkeypatch.setattr(build_engine, "load", lambda _: recorded)
    monkeypatch.chdir(tmp_path)
    build_engine.build(SETTINGS, Path())
    library = str(tmp_path.resolve() / "n.plugins.so")
    assert recorded.calls == [("library", library), ("network", "n.onnx"), ("build", [library])]
    without = Recorded()
    monkeypatch.setattr(build_engine, "load", lambda _: without)
    build_engine.build(SETTINGS | {"plugins": None}, Path())
    assert without.calls == [("network", "n.onnx"), ("build", [])]


@pytest.mark.parametrize(
    ("builder", "words"),
    [("tensorrt", "tensorrt 10.16.1 cannot load the plugins of n.plugins.so: it is for another TensorRT$"), ("rtx", "--stock$")],
)
def test_a_library_that_does_not_load(builder: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_engine, "load", lambda _: Recorded(loads=False))
    with pytest.raises(build_engine.BuildError, match=words):
        build_engine.build(SETTINGS | {"builder": builder}, tmp_path)
