"""An engine for a device without a server: one folder that ONNX Runtime alone runs, in Python or C++."""

import importlib.metadata
import platform
import shlex
import shutil
from pathlib import Path
from string import Template

from rq_compile.errors import UserError
from rq_compile.files import folder_written_beside, sha256
from rq_compile.packaging.package import Package
from rq_compile.packaging.sbom import bill_of_materials
from rq_compile.runtime.files import engine_files, manifest_path, read_manifest, verify
from rq_compile.targets.library import library_path
from rq_compile.targets.manifest import Manifest

TEMPLATES = Path(__file__).parent / "edge_files"
OP_LIBRARY = "librq_moe.so"
CHECKSUMS = "SHA256SUMS"
MATERIALS = "sbom.cdx.json"
OURS = {OP_LIBRARY, "LICENSE", "README.md", "generate.py", "generate.cc"}


def package(source: Path, output: Path) -> Package:
    """Write the engine, its op library, two examples, a README with the sizes, the licence, a bill of materials and the
    checksums of all of them.

    The same engine and op library give the same bytes.

    Raises:
        UserError: ``source`` is no whole engine or is damaged, is an encoder-decoder, or see ``folder_written_beside``.
    """
    manifest = read_manifest(source)
    if manifest.encoder_decoder:
        raise UserError(f"{source} is an encoder-decoder, which the examples cannot run; package a decoder-only engine", 2)
    verify(source, manifest)

    with folder_written_beside(output) as folder:
        for path in (manifest_path(source), *(source.parent / file.name for file in engine_files(manifest))):
            shutil.copyfile(path, folder / path.name)
        if manifest.op_library is not None:
            shutil.copyfile(library_path(), folder / OP_LIBRARY)
        (folder / "LICENSE").write_text(licence())
        write_examples(source.name, manifest, folder)
        write_readme(source.name, manifest, folder)
        write_inventory(source.name, folder)
        files = sorted(path.name for path in folder.iterdir())

    example = shlex.quote(str(output / "generate.py"))
    prompt = "--ids 1 2 3" if manifest.tokenizer is None else '"Once upon a time"'
    return Package(
        destination="edge",
        folder=str(output),
        files=files,
        run=[f"cd {shlex.quote(str(output))} && sha256sum -c {CHECKSUMS}", f"python {example} {prompt}"],
        remarks=[library_remark(manifest), "the weights and the tokenizer stay under the licence of their model"],
    )


def write_examples(engine: str, manifest: Manifest, folder: Path) -> None:
    shutil.copyfile(TEMPLATES / "generate.py", folder / "generate.py")
    example = Template((TEMPLATES / "generate.cc").read_text()).substitute(
        engine=engine.replace("\\", "\\\\").replace('"', '\\"'),
        op_library="" if manifest.op_library is None else OP_LIBRARY,
        limit_folding=str(manifest.lowering == "batched").lower(),
        end_of_text=", ".join(map(str, manifest.end_of_text)),
    )
    (folder / "generate.cc").write_text(example)


def write_readme(engine: str, manifest: Manifest, folder: Path) -> None:
    sizes = [f"| {path.name} | {path.stat().st_size:,} |" for path in sorted(folder.iterdir())]
    readme = Template((TEMPLATES / "README.md").read_text()).substitute(
        engine=engine, tool=manifest.tool, library=sentence(library_remark(manifest)), files="\n".join(sizes)
    )
    (folder / "README.md").write_text(readme)


def write_inventory(engine: str, folder: Path) -> None:
    """The bill of materials, and the checksums as ``sha256sum`` writes and checks them."""
    digests = {path.name: sha256(path) for path in folder.iterdir()}
    (folder / MATERIALS).write_text(bill_of_materials(folder, engine, digests, OURS))
    digests[MATERIALS] = sha256(folder / MATERIALS)
    (folder / CHECKSUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))


def library_remark(manifest: Manifest) -> str:
    if manifest.op_library is None:
        return "the engine needs no op library: it runs wherever ONNX Runtime does"
    machine = f"{platform.system()} {platform.machine()}"
    return f"the op library {OP_LIBRARY} is built for {machine} and chooses its kernels by what the processor has when it loads"


def sentence(remark: str) -> str:
    return f"{remark[0].upper()}{remark[1:]}."


def licence() -> str:
    """Ours, from the installed distribution or else the source tree."""
    try:
        installed = importlib.metadata.distribution("rq-compile").read_text("licenses/LICENSE")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    return installed or (Path(__file__).parents[2] / "LICENSE").read_text()
