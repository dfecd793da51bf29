"""Where a figure comes from: the processor, the commit and the versions that it was measured with."""

import json
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rq_compile.standalone.limits import usable_cpus

PACKAGES = ("rq-compile", "onnxruntime", "torch", "transformers", "numpy")
CPU_INFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The processor's name with family and model: in a virtual machine, several generations may have the same name."""
    text = CPU_INFO.read_text() if CPU_INFO.is_file() else ""
    found = [re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")]
    name, family, model = (match[1].strip() if match else "" for match in found)
    if not name:
        return platform.processor() or platform.machine()
    return f"{name}, family {family} model {model}" if family else name


def provenance(*packages: str) -> dict[str, str]:
    """Commit ("+" if the tree has changes), date, and the versions of ``packages`` that are installed."""
    versions = {package: found for package in packages if (found := _version(package))}
    return {"commit": _commit(), "date": date.today().isoformat()} | versions


def origin() -> dict[str, Any]:
    """The processor, the number of CPUs that this process may use, and ``provenance``."""
    return {"processor": processor(), "cpus": usable_cpus(), **provenance(*PACKAGES)}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write ``rows`` as JSON, each with its ``origin``."""
    here = origin()
    path.write_text(json.dumps([{**row, **here} for row in rows], indent=1) + "\n")


def add_rows(path: Path, rows: Iterable[Mapping[str, Any]], key: str) -> None:
    """Write ``rows``, each with its ``origin``, into ``path``, in place of the rows there that have the same ``key``."""
    here = origin()
    added = [{**row, **here} for row in rows]
    known = json.loads(path.read_text()) if path.exists() else []
    replaced = {row[key] for row in added}
    path.write_text(json.dumps([*(row for row in known if row[key] not in replaced), *added], indent=1) + "\n")


def _commit() -> str:
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or sources without their history
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
