"""Compiles a TensorRT engine, or all that its builder needs. Network, engine, context model and manifest appear together."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rq_compile import __version__
from rq_compile.architectures.model import Model
from rq_compile.architectures.rope import recomputed_beyond
from rq_compile.architectures.ties import remarks_on_ties
from rq_compile.calibration.statistics import Statistics
from rq_compile.engine.appearing import Appearing
from rq_compile.engine.manifest import EngineFile
from rq_compile.errors import UserError
from rq_compile.export.export import export_graph
from rq_compile.export.exported import Exported
from rq_compile.file_systems import PART, publish
from rq_compile.files import sha256, write_document
from rq_compile.lowerings import Lowering, Plugins, TensorRTLanes
from rq_compile.outputs import check_outputs
from rq_compile.planning.schema import LayerPlan, Plan
from rq_compile.quantization.formats import SLOT_FORMATS
from rq_compile.targets.engine_outputs import tensorrt_outputs
from rq_compile.targets.preflight import check_plan, held_in_more_bits
from rq_compile.targets.streamed import mean_outputs_for
from rq_compile.targets.tensorrt import build_engine, plugins
from rq_compile.targets.tensorrt.ep_context import ep_context
from rq_compile.targets.tensorrt.manifest import Built, TensorRTManifest, TensorRTTarget, bindings
from rq_compile.targets.tensorrt.network import FP16_MOST, Network, Precision, expected_capacity, write_network
from rq_compile.targets.tensorrt.profiles import Profile
from rq_compile.targets.tensorrt.trtexec import trtexec
from rq_compile.targets.weights_file import Progress

BuilderName = Literal["tensorrt", "rtx"]
TARGETS: dict[BuilderName, TensorRTTarget] = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}
# TensorRT's parser cannot convert a wider TopK into a layer.
MOST_EXPERTS = 3840
WITHOUT_INT4 = WITHOUT_BF16 = 75


@dataclass(frozen=True)
class Settings:
    """How to build. ``capabilities`` are compute capabilities, 89 for 8.9; without ``build``, everything but the build is done.

    ``plugins``: the library that MoE layers are built with; None: they are standard ops.
    """

    builder: BuilderName
    profiles: Sequence[Profile]
    capabilities: Sequence[int] = ()
    precision: Precision = "fp16"
    build: bool = True
    plugins: Path | None = None

    @property
    def lowering(self) -> Lowering:
        """How MoE layers are implemented: with the plugins, or in standard ops with lanes as wide as the profiles need."""
        if self.plugins is not None:
            return Plugins(half=self.precision)
        return TensorRTLanes(expected=expected_capacity(self.profiles))


def remarks_before(model: Model, plan: Plan, settings: Settings) -> Iterator[str]:
    """What a user should know before a compilation: experts that tie, and slots in more bits than planned."""
    yield from remarks_on_ties(model)
    if settings.plugins is None and (wider := held_in_more_bits(plan, settings.lowering, "--stock", "--plugins LIBRARY")):
        yield wider


def compile_tensorrt(
    model: Model,
    plan: Plan,
    output: Path,
    settings: Settings,
    *,
    statistics: Statistics | None = None,
    exported: Exported | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> TensorRTManifest:
    """Write ``output`` (``.plan``); beside it ``<stem>.context.onnx`` for ONNX Runtime, the tokenizer and the manifest.

    Without ``settings.build``, what the engine is built from is written instead of the engine: ``<stem>.network.onnx`` and its
    ``.data``, and ``<stem>.build.py``, ``<stem>.build.json`` and ``<stem>.build.sh``, which build it on the machine that has the
    GPU. With ``settings.plugins``, the plugin library is copied to ``<stem>.plugins.so``; a built engine includes it, too.
    ``statistics``, ``exported``, ``threads`` and ``progress``: see ``compile_engine``.

    Raises:
        UserError: the plan or the settings do not fit, or the builder is missing or failed. No files are left behind.
    """
    check_outputs(tensorrt_outputs(output))
    check_settings(settings, model, plan)
    check_plan(model, plan, settings.lowering)
    outputs = mean_outputs_for(plan, statistics)
    exported = exported or export_graph(model)
    stem, moments = output.stem, statistics if plan.quantizer == "gptq" else None
    with tempfile.TemporaryDirectory(prefix=PART, dir=output.parent) as name:
        folder = Path(name)
        network = write_network(
            model,
            plan,
            exported,
            settings.lowering,
            folder / f"{stem}.network.onnx",
            precision=settings.precision,
            statistics=moments,
            outputs=outputs,
            threads=threads,
            progress=progress,
        )
        _write_build_files(folder, stem, settings, network)
        built = _build(folder, stem) if settings.build else None
        _write_context(folder, stem, settings, network, built)
        if model.has_tokenizer:
            (folder / f"{stem}.tokenizer.json").write_text(model.tokenizer.to_str(), encoding="utf-8")
        files = _kept(folder, stem, built is not None)
        manifest = TensorRTManifest(
            tool=f"rq-compile {__version__}",
            target=TARGETS[settings.builder],
            precision=settings.precision,
            lowering=settings.lowering.name,
            compute_capabilities=list(settings.capabilities),
            files=files,
            inputs=bindings(network.model.graph.input),
            outputs=bindings(network.model.graph.output),
            profiles=list(settings.profiles),
            built=built,
            replaced=network.replaced,
            remarks=list(model.remarks),
            recomputed_beyond=recomputed_beyond(model.config),
            plan=plan,
        )
        write_document(manifest, folder / f"{stem}.json")
        # All files exist now. The manifest comes last, so that the files it describes always exist beside it.
        names = [*(file.name for file in files.values()), f"{stem}.json"]
        with Appearing(output) as appearing:
            appearing.begin(names)
            for name in names:
                publish(folder / name, output.parent / name)
    return manifest


def check_settings(settings: Settings, model: Model, plan: Plan | None = None) -> None:
    """Reject, before the long work, what a builder would reject after it. The layers are checked if a plan is given.

    Raises:
        UserError: the builder or the plugin library is missing, or does not support the model, a compute capability or a layer.
    """
    if model.config.is_encoder_decoder:
        raise UserError(
            f"{model.name} is an encoder-decoder, which the TensorRT targets do not support; give an output that ends in .onnx", 2
        )
    if settings.plugins is not None:
        if settings.builder == "rtx":
            raise UserError("--builder rtx does not support plugins; leave --plugins out, or choose --builder tensorrt", 2)
        plugins.check_library(settings.plugins)
    if settings.build:
        try:
            known = build_engine.capabilities(build_engine.load(settings.builder))
        except build_engine.BuildError as error:
            raise UserError(f"{error}; or write what the builder needs, with --no-build", 2) from error
        if settings.builder == "rtx" and (missing := [number for number in settings.capabilities if number not in known]):
            raise UserError(f"TensorRT-RTX does not build for --sm {missing[0]}; choose from {', '.join(map(str, known))}", 2)
    if settings.builder == "rtx" and not settings.capabilities:
        raise UserError("--builder rtx builds ahead of time; name the GPUs to build for, for example --sm 80,89,120", 2)
    if settings.builder == "tensorrt" and settings.capabilities:
        raise UserError("--builder tensorrt builds for the GPU of the machine it runs on; leave --sm out", 2)
    if settings.precision == "bf16" and WITHOUT_BF16 in settings.capabilities:
        raise UserError(
            f"the network is bf16, which --sm {WITHOUT_BF16} lacks; leave it out, or choose --precision fp16, whose largest "
            f"number is {FP16_MOST}",
            2,
        )
    for layer in plan.layers if plan else ():
        check_layer(layer, settings)


def check_layer(layer: LayerPlan, settings: Settings) -> None:
    """
    Raises:
        UserError: the builder, its GPU or the plugins do not support the layer.
    """
    settings.lowering.check_layer(layer)
    if layer.geometry.experts > MOST_EXPERTS:
        raise UserError(
            f"layer {layer.index} has {layer.geometry.experts} experts, more than the {MOST_EXPERTS} of TensorRT's TopK; "
            "compile it for ONNX Runtime, with an output that ends in .onnx",
            2,
        )
    kept = [slot.format for slot in layer.slots if SLOT_FORMATS[slot.format].element == "int4"]
    if kept and WITHOUT_INT4 in settings.capabilities:
        raise UserError(f"layer {layer.index} has experts in {kept[0]}, which --sm {WITHOUT_INT4} lacks; plan without it", 2)


def _write_build_files(folder: Path, stem: str, settings: Settings, network: Network) -> None:
    shapes = [profile.shapes(network.model) for profile in settings.profiles]
    library = None
    if settings.plugins is not None:
        library = f"{stem}.plugins.so"
        shutil.copyfile(settings.plugins, folder / library)
    content = {
        "network": f"{stem}.network.onnx",
        "engine": f"{stem}.plan",
        "builder": settings.builder,
        "plugins": library,
        "compute_capabilities": list(settings.capabilities),
        "timing_cache": f"{stem}.timing",
        "profiles": shapes,
    }
    (folder / f"{stem}.build.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(build_engine.__file__, folder / f"{stem}.build.py")
    line = trtexec(f"{stem}.network.onnx", f"{stem}.plan", f"{stem}.timing", shapes, library)
    (folder / f"{stem}.build.sh").write_text(line, encoding="utf-8")


def _build(folder: Path, stem: str) -> Built:
    """Build in a separate process: if the builder crashes, this process does not, and the builder's memory is freed
    afterwards."""
    command = [sys.executable, str(folder / f"{stem}.build.py"), str(folder / f"{stem}.build.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise UserError(said[-1] if said else f"the builder ended with status {done.returncode}; use --no-build to look into it")
    report = folder / f"{stem}.plan.report.json"
    return Built.model_validate_json(report.read_bytes())


def _write_context(folder: Path, stem: str, settings: Settings, network: Network, built: Built | None) -> None:
    sdk = built.builder.split()[-1] if built else ""
    model = ep_context(network.model, f"{stem}.plan", TARGETS[settings.builder], list(settings.capabilities), sdk)
    (folder / f"{stem}.context.onnx").write_bytes(model.SerializeToString(deterministic=True))


def _kept(folder: Path, stem: str, built: bool) -> dict[str, EngineFile]:
    """The files to keep, by their role: an engine alone, or what it is built from."""
    files = {"context model": f"{stem}.context.onnx", "tokenizer": f"{stem}.tokenizer.json", "plugins": f"{stem}.plugins.so"}
    if built:
        files |= {"engine": f"{stem}.plan", "timing cache": f"{stem}.timing"}
    else:
        files |= {"network": f"{stem}.network.onnx", "weights": f"{stem}.network.onnx.data"}
        files |= {"build script": f"{stem}.build.py", "build settings": f"{stem}.build.json", "trtexec line": f"{stem}.build.sh"}
    there = {what: folder / name for what, name in files.items() if (folder / name).is_file()}
    return {what: EngineFile(name=path.name, sha256=sha256(path), bytes=path.stat().st_size) for what, path in there.items()}
