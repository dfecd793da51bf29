"""An engine for a device without a server: one folder or archive that needs only ONNX Runtime, in Python or C++."""

import importlib.metadata
import platform
import shlex
import shutil
from pathlib import Path
from string import Template

from rq_compile import spill
from rq_compile.engine.library import library_path
from rq_compile.engine.manifest import Manifest
from rq_compile.engine.paths import manifest_path
from rq_compile.errors import UserError
from rq_compile.files import sha256, write_document
from rq_compile.lowerings import LOWERINGS
from rq_compile.lowerings.batched import FOLDING_LIMIT
from rq_compile.packaging.archive import Files, archive_writer, check_package, write_files
from rq_compile.packaging.op_library import machine, op_library, system_sentence
from rq_compile.packaging.package import Package
from rq_compile.packaging.sbom import bill_of_materials
from rq_compile.runtime.files import read_cpu_manifest, verify
from rq_compile.standalone import decoding, limits, sampling, text

TEMPLATES = Path(__file__).parent / "edge_files"
EXAMPLE = TEMPLATES / "generate.py"
# Modules of this package that do not import other modules of it.
SHARED = tuple(Path(module.__file__) for module in (decoding, limits, sampling, text) if module.__file__)
OP_LIBRARY = "librq_moe.so"
CHECKSUMS = "SHA256SUMS"
MATERIALS = "sbom.cdx.json"
OURS = {OP_LIBRARY, "LICENSE", "README.md", "generate.py", "generate.cc", *(path.name for path in SHARED)}


def package(source: Path, output: Path, library: Path | None = None, architecture: str | None = None) -> Package:
    """Write the engine, its op library, two examples, a README with the sizes, the licences, a bill of materials and checksums.

    ``output`` is a folder, or an archive if it ends in .tar.gz, .tgz or .zip. ``library`` replaces the op library of this
    machine. ``architecture`` is the architecture that the op library must be built for. The same engine and op library give the
    same bytes.

    Raises:
        UserError: ``source`` is not a complete engine, is damaged, is an encoder-decoder, or does not need the given op library;
            or see ``op_library`` and ``write_files``.
    """
    manifest = read_cpu_manifest(source)
    if manifest.encoder_decoder:
        raise UserError(f"{source} is an encoder-decoder, which the examples cannot run; package a decoder-only engine", 2)
    if library is not None and manifest.op_library is None:
        raise UserError(f"{source} runs in any ONNX Runtime, without an op library; leave --library out", 2)
    packed = None if manifest.op_library is None else op_library(library, architecture)
    check_package(output, [*engine_parts(source, manifest).values(), *([packed] if packed else [])])
    verify(source, manifest)

    remark = library_remark(manifest, packed)
    with spill.beside(output), spill.temporary_folder() as made:
        files = engine_parts(source, manifest)
        if packed is not None:
            files[OP_LIBRARY] = packed
        files |= written_parts(source.name, manifest, Path(made), files, remark)
        write_files(files, output, root=source.stem)
    return Package(
        destination="edge",
        folder=str(output),
        files=sorted(files),
        run=command_lines(source, manifest, output),
        remarks=[remark, licence_remark(manifest)],
    )


def engine_parts(source: Path, manifest: Manifest) -> dict[str, Path]:
    """The engine's own files: graph, weights, tokenizer, the licence texts of its model, and the manifest."""
    return {path.name: path for path in (manifest_path(source), *(source.parent / file.name for file in manifest.files))}


def written_parts(engine: str, manifest: Manifest, folder: Path, others: Files, remark: str) -> dict[str, Path]:
    """The files that describe the ``others`` and how to run them, written to ``folder``."""
    (folder / "LICENSE").write_text(licence(), encoding="utf-8")
    # Rewritten with the current keys, which the examples read, because the engine may be of an earlier release.
    write_document(manifest, manifest_path(folder / engine))
    write_examples(engine, manifest, folder)
    write_readme(engine, manifest, folder, others, remark)
    write_inventory(engine, manifest, folder, others)
    return {path.name: path for path in folder.iterdir()}


def write_examples(engine: str, manifest: Manifest, folder: Path) -> None:
    for source in (EXAMPLE, *SHARED):
        shutil.copyfile(source, folder / source.name)
    example = Template((TEMPLATES / "generate.cc").read_text(encoding="utf-8")).substitute(
        engine=engine.replace("\\", "\\\\").replace('"', '\\"'),
        op_library="" if manifest.op_library is None else OP_LIBRARY,
        limit_folding=str(LOWERINGS[manifest.lowering].session_options == FOLDING_LIMIT).lower(),
        end_of_text=", ".join(map(str, manifest.end_of_text)),
        recomputed_beyond=-1 if manifest.recomputed_beyond is None else manifest.recomputed_beyond,
        prefill_chunk=manifest.prefill_chunk or 0,
        in_place=", ".join(f'"{tensor.past}"' for tensor in manifest.cache if tensor.in_place),
    )
    (folder / "generate.cc").write_text(example, encoding="utf-8")


def write_readme(engine: str, manifest: Manifest, folder: Path, others: Files, remark: str) -> None:
    parts = {**others, **{path.name: path for path in folder.iterdir()}}
    sizes = [f"| {name} | {parts[name].stat().st_size:,} |" for name in sorted(parts)]
    readme = Template((TEMPLATES / "README.md").read_text(encoding="utf-8")).substitute(
        engine=engine,
        tool=manifest.tool,
        library=sentence(remark),
        model_licence=sentence(licence_remark(manifest)),
        files="\n".join(sizes),
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def write_inventory(engine: str, manifest: Manifest, folder: Path, others: Files) -> None:
    """Write the bill of materials, and the checksums in the format of ``sha256sum``."""
    parts = {**others, **{path.name: path for path in folder.iterdir()}}
    digests = {name: sha256(path) for name, path in parts.items()}
    of_model = {
        file.name: manifest.licence for file in (manifest.graph, manifest.weights, manifest.tokenizer) if file is not None
    }
    licences = {**of_model, **dict.fromkeys(OURS & parts.keys(), "Apache-2.0")}
    (folder / MATERIALS).write_text(bill_of_materials(engine, manifest.licence, parts, digests, licences), encoding="utf-8")
    digests[MATERIALS] = sha256(folder / MATERIALS)
    (folder / CHECKSUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())), encoding="utf-8")


def command_lines(source: Path, manifest: Manifest, output: Path) -> list[str]:
    prompt = "--ids 1 2 3" if manifest.tokenizer is None else '"Once upon a time"'
    if archive_writer(output) is None:
        folder, unpacked = str(output), []
    else:
        folder = source.stem
        unpacked = [f"{'unzip' if output.suffix == '.zip' else 'tar xf'} {shlex.quote(str(output))}"]
    example = shlex.quote(f"{folder}/generate.py")
    return [*unpacked, f"(cd {shlex.quote(folder)} && sha256sum -c {CHECKSUMS})", f"python {example} {prompt}"]


def library_remark(manifest: Manifest, library: Path | None = None) -> str:
    """Says for which systems the op library is built. ``library``: by default that of this machine."""
    if manifest.op_library is None:
        return "the engine does not need an op library: it runs wherever ONNX Runtime does"
    library = library or library_path()
    built_for = machine(library) or platform.machine()
    with_kernels = built_for in ("x86_64", "aarch64")
    kernels = "chooses its kernels for the processor when it loads" if with_kernels else "has no vector kernels there"
    return f"the op library {OP_LIBRARY} is built for {built_for} and {kernels}; {system_sentence(library)}"


def licence_remark(manifest: Manifest) -> str:
    declared = f" ({manifest.licence}, as its model card says)" if manifest.licence else ""
    texts = " and ".join(file.name for file in manifest.licences) or "the engine has no text of this licence"
    return f"the weights and the tokenizer stay under the licence of their model{declared}: {texts}"


def cache_remarks(manifest: Manifest) -> list[str]:
    """Remarks for destinations that keep the cache themselves."""
    if manifest.recomputed_beyond is None:
        return []
    return [
        f"transformers' generate computes a sequence again when it first exceeds {manifest.recomputed_beyond} tokens; here, the "
        "cache is kept, and answers differ from then on: start such a sequence again with all of its tokens"
    ]


def sentence(remark: str) -> str:
    return f"{remark[0].upper()}{remark[1:]}."


def licence() -> str:
    """The licence of rq-compile, from the installed distribution or otherwise from the source tree."""
    try:
        installed = importlib.metadata.distribution("rq-compile").read_text("licenses/LICENSE")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    return installed or (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
