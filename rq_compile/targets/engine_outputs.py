"""The files of an engine, for the guard of outputs."""

from collections.abc import Iterable
from pathlib import Path

from rq_compile.engine.appearing import left_over
from rq_compile.outputs import Recognizes, engine_of
from rq_compile.targets.licences import licence_texts

# Endings after the engine's stem.
OF_ONNX = (".onnx.data", ".tokenizer.json", ".chat_template.jinja")
# Which of these a TensorRT engine has depends on whether it is built on this machine.
OF_TENSORRT = (
    ".context.onnx",
    ".tokenizer.json",
    ".plugins.so",
    ".timing",
    ".network.onnx",
    ".network.onnx.data",
    ".build.py",
    ".build.json",
    ".build.sh",
)


def onnx_outputs(output: Path, model: Path, *, link_weights: bool = False) -> dict[Path, tuple[str, Recognizes]]:
    """The files that ``compile_engine`` writes for ``output`` (``.onnx``) and the checkpoint in the folder ``model``."""
    licences = licence_texts(model) if model.is_dir() else []
    shards = sorted(model.glob("*.safetensors")) if link_weights else []
    return engine_outputs(output, [*OF_ONNX, *(f".{path.name}" for path in (*licences, *shards))])


def tensorrt_outputs(output: Path) -> dict[Path, tuple[str, Recognizes]]:
    """The files that ``compile_tensorrt`` writes for ``output`` (``.plan``)."""
    return engine_outputs(output, OF_TENSORRT)


def engine_outputs(output: Path, endings: Iterable[str]) -> dict[Path, tuple[str, Recognizes]]:
    """``output``, ``<stem>.json`` and the files with the other ``endings``.

    They may be replaced if ``<stem>.json`` is the manifest of an engine called ``output``, or if an earlier compilation was
    stopped while they appeared.
    """
    manifest = output.with_suffix(".json")
    known, stopped = manifest.is_file() and engine_of(manifest) == output.name, left_over(output)
    ours = lambda path: known or path.name in stopped  # noqa: E731
    others = [output, *(output.parent / f"{output.stem}{ending}" for ending in endings)]
    return {manifest: ("engine's manifest", ours), **dict.fromkeys(others, ("engine", ours))}
