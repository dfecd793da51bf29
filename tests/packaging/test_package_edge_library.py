"""The op library in the folder for a device: when it is there, for which machine, and what it requires of the system."""

import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import Result
from command_line import names, refused
from edge_packages import Command

from rq_compile.engine.library import library_path
from rq_compile.packaging.op_library import needed_versions, system_sentence


def test_op_library_is_there_when_it_is_needed(engine: Path, packaged: Path) -> None:
    needed = engine.parent.name.startswith("native")
    assert (packaged / "librq_moe.so").exists() == needed
    assert ('kOpLibrary = "librq_moe.so"' in (packaged / "generate.cc").read_text()) == needed


def elf(path: Path, machine: int, rest: bytes = b"RegisterCustomOps\0", bits: int = 2) -> Path:
    header = b"\x7fELF" + bytes([bits, 1, 1]).ljust(12, b"\0") + (3).to_bytes(2, "little") + machine.to_bytes(2, "little")
    path.write_bytes(header + bytes(44) + rest)
    return path


@pytest.mark.parametrize(("number", "architecture"), [(62, "x86_64"), (183, "aarch64"), (243, "riscv64")])
def test_an_op_library_for_another_machine_is_packed(
    rq_compile: Command, native: Path, tmp_path: Path, number: int, architecture: str
) -> None:
    library = elf(tmp_path / "cross.so", number)
    arguments = (
        "package",
        native,
        "--for",
        "edge",
        "--library",
        library,
        "--architecture",
        architecture,
        "-o",
        tmp_path / "edge",
    )
    result = rq_compile(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "edge" / "librq_moe.so").read_bytes() == library.read_bytes()
    assert f"built for {architecture}" in json.loads(result.stdout)["remarks"][0]
    assert f"built for {architecture}" in (tmp_path / "edge" / "README.md").read_text()


def test_an_op_library_for_the_wrong_machine_is_refused(rq_compile: Command, native: Path, tmp_path: Path) -> None:
    def asked(*options: object) -> Result:
        return rq_compile("package", native, "--for", "edge", "-o", tmp_path / "edge", *options)

    library, other = tmp_path / "cross.so", "riscv64"
    refused(asked("--architecture", other), 2, "librq_moe.so is built for", f"not for {other}", "--library")
    refused(asked("--library", elf(library, 183), "--architecture", "x86_64"), 2, library, "built for aarch64, not for x86_64")
    refused(
        asked("--library", elf(library, 62, bits=1), "--architecture", "x86_64"), 2, library, "another system, not for x86_64"
    )
    refused(asked("--library", elf(library, 183, rest=b"")), 2, library, "is not an op library")
    library.write_bytes(b"")
    refused(asked("--library", library), 2, library, "is not an op library")
    refused(asked("--library", tmp_path / "missing.so"), 2, "missing.so", "No such file")
    assert names(tmp_path) == ["cross.so"]


def test_this_machines_op_library_is_for_this_machine(rq_compile: Command, native: Path, tmp_path: Path) -> None:
    arguments = ("package", native, "--for", "edge", "-o", tmp_path / "edge", "--architecture", platform.machine(), "-q")
    assert rq_compile(*arguments).exit_code == 0


def test_an_op_library_that_nothing_needs_is_refused(rq_compile: Command, batched: Path, tmp_path: Path) -> None:
    arguments = ("package", batched, "--for", "edge", "-o", tmp_path / "edge")
    refused(rq_compile(*arguments, "--library", elf(tmp_path / "cross.so", 183)), 2, "--library")
    # But it runs on every machine.
    assert rq_compile(*arguments, "--architecture", "aarch64", "-q").exit_code == 0


# System requirements


def test_the_package_states_the_least_versions_of_the_system_s_libraries(rq_compile: Command, stages: Path, out: Path) -> None:
    result = rq_compile("package", stages / "model.onnx", "--for", "edge", "-o", out / "edge", "--json")
    assert result.exit_code == 0, result.stderr
    needed = needed_versions(library_path())
    told = (
        shutil.which("objdump")
        and subprocess.run(["objdump", "-T", library_path()], capture_output=True, text=True, check=True).stdout
    )
    for name in ("GLIBC", "GLIBCXX"):
        if told:
            versions = [tuple(map(int, version.split("."))) for version in re.findall(rf"{name}_([\d.]+)\)", told)]
            assert needed[name] == ".".join(map(str, max(versions)))
    sentence = f"it loads on systems that have at least glibc {needed['GLIBC']} and a libstdc++ with GLIBCXX_{needed['GLIBCXX']}"
    assert sentence in json.loads(result.stdout)["remarks"][0]
    assert sentence in (out / "edge" / "README.md").read_text()
    parts = {part["name"]: part for part in json.loads((out / "edge" / "sbom.cdx.json").read_text())["components"]}
    assert sentence in parts["librq_moe.so"]["description"]


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF\2\1\1" + bytes(57), b"\x7fELF\2\1\1" + b"\xff" * 500, b"text"])
def test_what_is_no_whole_library_asks_for_nothing(out: Path, content: bytes) -> None:
    (out / "library.so").write_bytes(content)
    assert needed_versions(out / "library.so") == {}
    assert system_sentence(out / "library.so") == "it does not require a version of glibc"
