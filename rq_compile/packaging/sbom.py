"""The bill of materials of a packaged folder, in CycloneDX 1.6 JSON."""

from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

OURS, RUNTIME = "Apache-2.0", "MIT"


def bill_of_materials(folder: Path, engine: str, digests: dict[str, str], ours: set[str]) -> str:
    """Every file of ``digests`` (name -> SHA-256) with its size, and ONNX Runtime, which runs it and is not in it.

    ``ours`` are the files that come with rq-compile's licence; of the others none is claimed. The same files give the same
    bytes: no time is written, and the serial number follows from the files.
    """
    files = [component(folder / name, digest, name in ours) for name, digest in sorted(digests.items())]
    runtime = Component(
        type=ComponentType.LIBRARY,
        name="onnxruntime",
        bom_ref="onnxruntime",
        purl=PackageURL("pypi", name="onnxruntime"),
        description="runs the engine; not in this folder",
        licenses=[LicenseExpression(RUNTIME)],
    )
    model = Component(type=ComponentType.MACHINE_LEARNING_MODEL, name=Path(engine).stem, bom_ref="engine")
    bom = Bom(components=[*files, runtime])
    bom.metadata.component = model
    bom.metadata.timestamp = None  # type: ignore[assignment] # optional in the format, but not in the library's types
    bom.serial_number = uuid5(NAMESPACE_URL, "".join(f"{digests[name]} {name}\n" for name in sorted(digests)))
    bom.register_dependency(model, [*files, runtime])
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def component(path: Path, digest: str, ours: bool) -> Component:
    return Component(
        type=ComponentType.LIBRARY if path.suffix == ".so" else ComponentType.FILE,
        name=path.name,
        bom_ref=f"file:{path.name}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
        properties=[Property(name="bytes", value=str(path.stat().st_size))],
        licenses=[LicenseExpression(OURS)] if ours else [],
    )
