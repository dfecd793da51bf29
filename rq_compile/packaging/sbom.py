"""The bill of materials of a package, in CycloneDX 1.6 JSON."""

from collections.abc import Mapping
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License, LicenseAcknowledgement
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from rq_compile.packaging.op_library import system_sentence

RUNTIME = "MIT"


def bill_of_materials(
    engine: str,
    model_licence: str | None,
    files: Mapping[str, Path],
    digests: Mapping[str, str],
    licences: Mapping[str, str | None],
) -> str:
    """The bill of materials of ``files`` (name -> path): size and SHA-256 (``digests``) of each, the oldest system libraries for
    a library, and ONNX Runtime, which runs them but is not among them.

    ``licences``: an SPDX identifier or a name, by file name. For None, and for other files, no licence is claimed. The same files
    give the same bytes: no time is written, and the serial number follows from the files.
    """
    components = [component(name, files[name], digests[name], licences.get(name)) for name in sorted(files)]
    runtime = Component(
        type=ComponentType.LIBRARY,
        name="onnxruntime",
        bom_ref="onnxruntime",
        purl=PackageURL("pypi", name="onnxruntime"),
        description="runs the engine; not in this folder",
        licenses=declared(RUNTIME),
    )
    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL, name=Path(engine).stem, bom_ref="engine", licenses=declared(model_licence)
    )
    bom = Bom(components=[*components, runtime])
    bom.metadata.component = model
    bom.metadata.timestamp = None  # type: ignore[assignment] # optional in the format, but not in the library's types
    bom.serial_number = uuid5(NAMESPACE_URL, "".join(f"{digests[name]} {name}\n" for name in sorted(digests)))
    bom.register_dependency(model, [*components, runtime])
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def component(name: str, path: Path, digest: str, licence: str | None) -> Component:
    return Component(
        type=ComponentType.LIBRARY if path.suffix == ".so" else ComponentType.FILE,
        name=name,
        bom_ref=f"file:{name}",
        description=system_sentence(path) if path.suffix == ".so" else None,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
        properties=[Property(name="bytes", value=str(path.stat().st_size))],
        licenses=declared(licence),
    )


def declared(licence: str | None) -> list[License]:
    made = (
        LicenseFactory().make_from_string(licence, license_acknowledgement=LicenseAcknowledgement.DECLARED) if licence else None
    )
    return [made] if made else []
