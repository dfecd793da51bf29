"""Describes the machine of a benchmark in one line, because speeds only have a meaning together with their machine."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from rq_compile.standalone.limits import cpu_quota, usable_cpus

CPU_INFO = Path("/proc/cpuinfo")


def describe_machine() -> str:
    """Processor, CPUs that this process may use and why not all, system, and versions of the runtimes."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "torch"))
    return f"{_processor()}, {_cpus()}, {platform.system()} {platform.machine()}, {packages}"


def _cpus() -> str:
    quota, usable, there = cpu_quota(), usable_cpus(), os.cpu_count() or 1
    cpus = f"{there} CPUs" if usable == there else f"{usable} of {there} CPUs"
    return cpus if quota is None else f"{cpus} (quota {quota:.3g})"


def _processor() -> str:
    names = (
        re.findall(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE) if CPU_INFO.is_file() else []
    )
    return names[0].strip() if names else platform.processor() or "unknown processor"
