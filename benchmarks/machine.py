"""The ceilings of this machine, measured by machine_probe.cc: read bandwidth and peaks of arithmetic."""

import ctypes
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

KINDS = ("fp32", "int8", "int4")
READ_BYTES = 512 << 20


@dataclass(frozen=True)
class Machine:
    """Bytes/s read from memory, and multiply-adds/s of fp32, int8 times int8 and int4 times int8: ``peaks[kind]``."""

    bandwidth: float
    peaks: dict[str, float]


class Probe:
    """Measures; needs a C++ compiler (``c++``)."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "probe.so"
            source = Path(__file__).with_name("machine_probe.cc")
            command = ["c++", "-std=c++17", "-O2", "-march=native", "-pthread", "-shared", "-fPIC", source, "-o", library]
            subprocess.run(command, check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.read_bandwidth.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        self._library.peak.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
        self._library.read_bandwidth.restype = self._library.peak.restype = ctypes.c_double

    def machine(self, threads: int, trials: int = 10) -> Machine:
        peaks = {kind: self._library.peak(i, threads, trials) for i, kind in enumerate(KINDS)}
        return Machine(self._library.read_bandwidth(READ_BYTES, threads, trials), peaks)


if __name__ == "__main__":
    for threads in (1, 2):
        machine = Probe().machine(threads)
        peaks = ", ".join(f"{kind} {peak / 1e9:.0f}" for kind, peak in machine.peaks.items())
        print(f"{threads} threads: {machine.bandwidth / 1e9:.1f} GB/s; multiply-adds in 10^9/s: {peaks}")
