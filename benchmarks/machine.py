"""The ceilings of this machine, measured by machine_probe.cc: read bandwidth and peaks of arithmetic."""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = ("fp32", "bf16", "int8", "int4")


@dataclass(frozen=True)
class Machine:
    """Bytes/s read from memory, and multiply-adds/s of fp32, bf16, int8 times int8 and int4 times int8: ``peaks[kind]``."""

    bandwidth: float
    peaks: dict[str, float]

    @staticmethod
    def of(several: Sequence["Machine"], choose: Callable[[Iterable[float]], float]) -> "Machine":
        """Each ceiling is chosen (max, median) from those of ``several`` measurements."""
        peaks = {kind: choose(one.peaks[kind] for one in several) for kind in KINDS}
        return Machine(choose(one.bandwidth for one in several), peaks)

    def __str__(self) -> str:
        peaks = ", ".join(f"{kind} {2 * peak / 1e9:.0f}" for kind, peak in self.peaks.items())
        return f"reads {self.bandwidth / 1e9:.1f} GB/s; peaks in GFLOP/s: {peaks}"


class Probe:
    """Measures the ceilings; needs a C++ compiler (``c++``)."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "probe.so"
            source = Path(__file__).with_name("machine_probe.cc")
            command = [
                "c++",
                "-std=c++17",
                "-O2",
                "-march=native",
                "-pthread",
                "-shared",
                "-fPIC",
                str(source),
                "-o",
                str(library),
            ]
            subprocess.run(command, check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.read_bandwidth.argtypes = [ctypes.c_int]
        self._library.peak.argtypes = [ctypes.c_int, ctypes.c_int]
        self._library.read_bandwidth.restype = self._library.peak.restype = ctypes.c_double

    def machine(self, threads: int) -> Machine:
        """One measurement, which takes about 10 ms."""
        peaks = {kind: self._library.peak(i, threads) for i, kind in enumerate(KINDS)}
        return Machine(self._library.read_bandwidth(threads), peaks)


if __name__ == "__main__":
    probe = Probe()
    for threads in (1, 2):
        print(f"{threads} threads: {Machine.of([probe.machine(threads) for _ in range(20)], max)}")
