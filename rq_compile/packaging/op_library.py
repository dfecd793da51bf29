"""The op library of a package: the one for this machine, or one that was built for another architecture."""

import mmap
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

import rq_compile
from rq_compile.engine.library import CPU_LIBRARY, library_path
from rq_compile.errors import UserError

# The machine field of a 64-bit ELF header, by the names that Linux and its packages use.
MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64"}
# Prefixes of versioned symbols of the system's libraries: glibc, and the two parts of libstdc++.
VERSIONED = ("GLIBC", "GLIBCXX", "CXXABI")
ENTRY = b"RegisterCustomOps\0"  # the symbol that ONNX Runtime looks up


def op_library(given: Path | None, architecture: str | None) -> Path:
    """The library to package: ``given``, or otherwise the one that was built for ``architecture`` (``make aarch64``) or with this
    package.

    Raises:
        UserError: it is missing, is not an op library, or is not for ``architecture``.
    """
    path = given or built_for_architecture(architecture) or library_path()
    built_for = machine(path)
    if architecture is not None and built_for != architecture:
        raise UserError(
            f"the op library {path} is built for {built_for or 'another system'}, not for {architecture}; "
            "build one for it (make aarch64, or as in plugins/onnxruntime/README.md) and give it with --library",
            2,
        )
    if given is not None and not exports_ops(given):
        raise UserError(f"{given} is not an op library, because it lacks RegisterCustomOps; give a librq_moe.so", 2)
    return path


def built_for_architecture(architecture: str | None) -> Path | None:
    """The op library in the package for an architecture other than this machine's; None if there is none."""
    if architecture is None:
        return None
    path = Path(rq_compile.__file__).parent / "lib" / architecture / CPU_LIBRARY
    return path if path.is_file() else None


def machine(library: Path) -> str | None:
    """The architecture of an ELF library; None if it is not a 64-bit ELF file, or is for a machine that is not listed here.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with library.open("rb") as file:
            header = file.read(20)
    except OSError as error:
        raise UserError(f"cannot read the op library {library}: {error.strerror}; check --library", 2) from error
    if not header.startswith(b"\x7fELF\2") or len(header) < 20:
        return None
    return MACHINES.get(int.from_bytes(header[18:20], "big" if header[5] == 2 else "little"))


def exports_ops(library: Path) -> bool:
    with library.open("rb") as file:
        if not library.stat().st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(ENTRY) >= 0


def needed_versions(library: Path) -> dict[str, str]:
    """The oldest versions of the system's libraries with which an ELF library loads, from its table of needed symbol versions:
    ``{"GLIBC": "2.14", "GLIBCXX": "3.4.21"}``. Empty for other files, and if no version is required.

    Raises:
        OSError: the file cannot be read.
    """
    needed: dict[str, tuple[int, ...]] = {}
    try:
        with library.open("rb") as file:
            tables = [section for section in ELFFile(file).iter_sections() if isinstance(section, GNUVerNeedSection)]
            names = [version.name for table in tables for _, versions in table.iter_versions() for version in versions]
    except OSError:
        raise
    except Exception:  # for a file that is not ELF, or is damaged, the parser may raise anything
        return {}
    for name in names:
        prefix, _, number = name.partition("_")
        parts = number.split(".")
        if prefix in VERSIONED and all(part.isdecimal() for part in parts):
            needed[prefix] = max(needed.get(prefix, ()), tuple(map(int, parts)))
    return {prefix: ".".join(map(str, needed[prefix])) for prefix in VERSIONED if prefix in needed}


def system_sentence(library: Path) -> str:
    """Describes ``needed_versions`` in a sentence."""
    needed = needed_versions(library)
    words = [f"glibc {needed['GLIBC']}"] if "GLIBC" in needed else []
    symbols = [f"{name}_{needed[name]}" for name in ("GLIBCXX", "CXXABI") if name in needed]
    if symbols:
        words.append(f"a libstdc++ with {' and '.join(symbols)}")
    return f"it loads on systems that have at least {' and '.join(words)}" if words else "it does not require a version of glibc"
