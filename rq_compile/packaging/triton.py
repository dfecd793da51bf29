"""A model repository for Triton Inference Server, in one of the flavours that can run the engine."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rq_compile.engine.manifest import Manifest
from rq_compile.engine.paths import manifest_path
from rq_compile.errors import UserError
from rq_compile.files import folder_written_beside, sha256, write_document
from rq_compile.packaging import triton_onnxruntime, triton_python, triton_tensorrt
from rq_compile.packaging.edge import CHECKSUMS, engine_parts, library_remark, licence, licence_remark
from rq_compile.packaging.package import Package
from rq_compile.packaging.triton_config import as_text, messages
from rq_compile.runtime.files import read_cpu_manifest, verify
from rq_compile.targets.tensorrt.manifest import TensorRTManifest

Flavour = Literal["python", "onnxruntime", "tensorrt"]
WRITERS: dict[Flavour, Callable[..., tuple[Any, list[str]]]] = {
    "python": triton_python.write,
    "onnxruntime": triton_onnxruntime.write,
    "tensorrt": triton_tensorrt.write,
}
OPTIONS: dict[Flavour, set[str]] = {
    "python": {"threads"},
    "onnxruntime": {"mount", "threads", "instances", "calibration"},
    "tensorrt": {"engine_for"},
}
ENDINGS: dict[Flavour, str] = {"python": ".onnx", "onnxruntime": ".onnx", "tensorrt": ".plan"}
IMAGE = "nvcr.io/nvidia/tritonserver:25.12-py3"


def package(source: Path, output: Path, flavour: Flavour | None = None, name: str | None = None, **options: Any) -> Package:
    """Write ``<name>/config.pbtxt``, ``<name>/1/`` with the engine, the licence and the checksums of all files.

    The default ``flavour`` is "tensorrt" for a ``.plan`` and "python" for an ``.onnx``. ``name`` is the name of the model, by
    default that of the engine. ``options`` are those of the flavour's ``write``. The same engine, op library and options give
    the same bytes.

    Raises:
        UserError: ``name`` cannot be the name of a model; ``source`` is not a complete engine, is damaged or is an
            encoder-decoder; the flavour does not have or refuses an option; tritonclient is missing; or see
            ``folder_written_beside``.
    """
    name = name or source.stem
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise UserError(
            f"{name!r} cannot be the name of a model in Triton; give --name letters and digits, with dots and dashes between", 2
        )
    if name in ("LICENSE", "README.md", CHECKSUMS):
        raise UserError(f"the package has a file called {name}, so the model needs another name; give another --name", 2)
    flavour = flavour or ("tensorrt" if source.suffix == ".plan" else "python")
    if (flavour == "tensorrt") != (source.suffix == ".plan"):
        raise UserError(f"--flavour {flavour} does not support {source}; give an engine that ends in {ENDINGS[flavour]}", 2)
    if superfluous := sorted(options.keys() - OPTIONS[flavour]):
        raise UserError(
            f"--{superfluous[0].replace('_', '-')} has no effect with --flavour {flavour}; leave one of the two out", 2
        )
    messages()
    manifest = triton_tensorrt.read_engine(source) if flavour == "tensorrt" else read_onnx_engine(source)
    onnx_engine = manifest if isinstance(manifest, Manifest) else None

    with folder_written_beside(output) as repository:
        model = repository / name
        (model / "1").mkdir(parents=True)
        for part, path in (engine_parts(source, onnx_engine) if onnx_engine else {}).items():
            shutil.copyfile(path, model / "1" / part)
        if onnx_engine:  # rewritten with the current keys, which the python backend reads
            write_document(onnx_engine, manifest_path(model / "1" / source.name))
        config, remarks = WRITERS[flavour](source, manifest, model, **options)
        (model / "config.pbtxt").write_text(as_text(config), encoding="utf-8")
        (repository / "LICENSE").write_text(licence(), encoding="utf-8")
        if onnx_engine is not None and flavour == "python":
            (repository / "README.md").write_text(triton_python.readme(name, onnx_engine), encoding="utf-8")
        files = sorted(path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file())
        (repository / CHECKSUMS).write_text("".join(f"{sha256(repository / file)}  {file}\n" for file in files), encoding="utf-8")

    if flavour != "python":
        remarks.append("the container of the last command is a suggestion: no NVIDIA image was tried with this package")
    if onnx_engine:
        remarks = [*remarks, library_remark(onnx_engine), licence_remark(onnx_engine)]
    text = onnx_engine is not None and onnx_engine.tokenizer is not None
    run = commands(output, name, flavour, text, options.get("mount", triton_onnxruntime.MOUNT))
    if isinstance(manifest, TensorRTManifest) and manifest.carries_code:
        run[-1] += f" {triton_tensorrt.CODE_ALLOWED}"
    return Package(destination="triton", folder=str(output), files=[*files, CHECKSUMS], run=run, remarks=remarks)


def read_onnx_engine(source: Path) -> Manifest:
    """
    Raises:
        UserError: it is not a complete engine, is damaged, or is an encoder-decoder.
    """
    manifest = read_cpu_manifest(source)
    if manifest.encoder_decoder:
        raise UserError(f"{source} is an encoder-decoder, which has no KV cache to serve from; package a decoder-only engine", 2)
    verify(source, manifest)
    return manifest


def commands(output: Path, name: str, flavour: Flavour, text: bool, mount: str) -> list[str]:
    check = f"(cd {shlex.quote(str(output))} && sha256sum -c {CHECKSUMS})"
    if flavour != "python":
        folder, gpus = shlex.quote(f"{output.resolve()}:{mount}:ro"), "--gpus=all " if flavour == "tensorrt" else ""
        server = f"tritonserver --model-repository={shlex.quote(mount)}"
        return [check, f"docker run --rm --net=host {gpus}-v {folder} {IMAGE} {server}"]
    asked = '"text_input": "Once upon a time"' if text else '"input_ids": [1, 2, 3]'
    return [
        check,
        f"tritonserver --model-repository={shlex.quote(str(output))}",
        f"curl localhost:8000/v2/models/{name}/generate -d '{{{asked}, \"max_tokens\": 32}}'",
    ]
