"""An engine's files: the graph, the weights and the manifest beside it, checked before anything is loaded."""

from pathlib import Path
from typing import NoReturn

from rq_compile.engine.appearing import list_of
from rq_compile.engine.library import OP_SET_VERSION
from rq_compile.engine.manifest import Manifest
from rq_compile.engine.paths import manifest_path, stem_of
from rq_compile.errors import UserError
from rq_compile.files import read_document, sha256


def read_manifest(engine: Path) -> Manifest:
    """Read the manifest of ``engine`` (an ``.onnx`` file, or a folder with a graph for each rank) and check that its files are
    complete.

    Raises:
        UserError: the engine, its manifest or one of its files is missing, a file has another size than recorded, or
            the compilation was stopped while the files appeared, or the engine needs a newer version of the ops.
    """
    if engine.suffix != ".onnx":
        return _read(engine) if manifest_path(engine).is_file() else _not_an_engine(engine)
    if not engine.is_file():
        raise UserError(f"no such engine: {engine}; compile one with rq-compile MODEL -o {engine.name}", 2)
    if not manifest_path(engine).is_file() and engine.is_symlink():
        name = manifest_path(engine).name
        raise UserError(f"{engine} has no manifest {name} beside it, because it is a link; name {engine.resolve()}", 2)
    if not manifest_path(engine).is_file():
        raise UserError(f"{engine} has no manifest {manifest_path(engine).name} beside it; copy it along or compile again", 2)
    return _read(engine)


def _not_an_engine(path: Path) -> NoReturn:
    if path.is_dir():
        raise UserError(f"{path} is not an engine: it has no {manifest_path(path).name}; name the output of rq-compile", 2)
    raise UserError(f"{path} is not an engine; name the .onnx file, or the folder, that rq-compile wrote", 2)


def _read(engine: Path) -> Manifest:
    if list_of(stem_of(engine)).is_file():
        raise UserError(f"{engine} is incomplete, because {list_of(stem_of(engine))} exists; compile it again", 2)
    manifest = read_document(Manifest, manifest_path(engine))
    if (needed := manifest.op_library or 0) > OP_SET_VERSION:
        raise UserError(
            f"{engine} needs version {needed} of the ops rq.moe, and this rq-compile has {OP_SET_VERSION}; update rq-compile, or "
            "compile the engine again with this one",
            2,
        )
    for file in manifest.files:
        path = stem_of(engine).parent / file.name
        if not path.is_file():
            raise UserError(f"{engine} needs {path}, which is missing; copy it along or compile again", 2)
        if (size := path.stat().st_size) != file.bytes:
            raise UserError(f"{path} has {size} bytes instead of {file.bytes}; copy it again or compile again", 2)
    return manifest


def check_one_process(engine: Path, command: str) -> None:
    """
    Raises:
        UserError: the manifest cannot be read, or ``engine`` has several ranks, which ``command`` cannot run: its processes would
            wait for each other.
    """
    if ranks := read_manifest(engine).ranks:
        raise UserError(
            f"{command} runs engines of one process, but {engine} has {len(ranks)}; compile the plan with -o engine.onnx", 2
        )


def read_cpu_manifest(engine: Path) -> Manifest:
    """``read_manifest`` for packagers, which support CPU engines only.

    Raises:
        UserError: also if the engine is for another provider.
    """
    manifest = read_manifest(engine)
    if manifest.ranks:
        raise UserError(
            f"{engine} is an engine of {len(manifest.ranks)} processes, but packages are for one; compile the plan with "
            "-o engine.onnx",
            2,
        )
    if manifest.provider != "CPUExecutionProvider":
        raise UserError(f"{engine} is for {manifest.provider}, but packages are for the CPU; compile with --lowering native", 2)
    return manifest


def verify(engine: Path, manifest: Manifest) -> None:
    """Recompute the SHA-256 of every file.

    Raises:
        UserError: a file differs from the manifest.
    """
    for file in manifest.files:
        path = stem_of(engine).parent / file.name
        if (digest := sha256(path)) != file.sha256:
            raise UserError(f"{path} is damaged: sha256 {digest[:12]}... instead of {file.sha256[:12]}...; compile again")
