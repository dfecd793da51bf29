"""What a benchmark ran on, in a line: a speed means something only beside its machine."""

import platform
import re
from importlib.metadata import version
from pathlib import Path

from rq_compile.targets.in_order import cores

CPU_INFO = Path("/proc/cpuinfo")


def describe_machine() -> str:
    """Processor, cores that this process may use, system, and the runtimes that were compared."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "torch"))
    return f"{_processor()}, {cores()} cores, {platform.system()} {platform.machine()}, {packages}"


def _processor() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(), re.MULTILINE) if CPU_INFO.is_file() else []
    return names[0].strip() if names else platform.processor() or "unknown processor"
