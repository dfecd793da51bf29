"""The files of an engine, for the guard of outputs."""

from collections.abc import Iterable
from pathlib import Path

from rq_compile.engine.appearing import left_over
from rq_compile.engine.paths import IN_FOLDER
from rq_compile.errors import UserError
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


def onnx_outputs(output: Path, model: Path, *, link_weights: bool = False, ranks: int = 0) -> dict[Path, tuple[str, Recognizes]]:
    """The files that ``compile_engine`` writes for ``output`` and the checkpoint in the folder ``model``.

    ``output`` is an ``.onnx`` file, or the folder of an engine of ``ranks`` processes.
    """
    if ranks and not output.exists():
        return {output: ("engine", lambda path: False)}
    licences = licence_texts(model) if model.is_dir() else []
    shards = sorted(model.glob("*.safetensors")) if link_weights else []
    of_ranks = [f".rank{rank}.onnx{ending}" for rank in range(ranks) for ending in ("", ".data")]
    beside = [*OF_ONNX, *of_ranks, *(f".{path.name}" for path in (*licences, *shards))]
    return engine_outputs(output / IN_FOLDER if ranks else output, beside)


def check_engine_path(output: Path, *, of_ranks: bool, ranks: int) -> None:
    """
    Raises:
        UserError: an engine of one process does not end in ``.onnx``, one of several does, or is for fewer than two ``ranks``.
    """
    if not of_ranks and output.suffix != ".onnx":
        raise UserError(f"{output} does not have the extension of an engine for ONNX Runtime; end it in .onnx", 2)
    if of_ranks and output.suffix in (".onnx", ".plan"):
        raise UserError(f"{output} names a file, but lowering ranks writes a folder; leave out its ending {output.suffix}", 2)
    if of_ranks and ranks < 2:
        raise UserError("the plan has 1 rank, but lowering ranks needs at least 2; plan with --ranks, or write an .onnx file", 2)


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
