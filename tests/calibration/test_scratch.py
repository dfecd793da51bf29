"""Memory that a calibration returns to the system."""

import subprocess
import sys

import numpy as np
import pytest

from rq_compile.calibration.memory import used_memory
from rq_compile.calibration.scratch import return_freed


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked to return memory")
@pytest.mark.parametrize("kilobytes", [16, 100])
def test_memory_between_arrays_in_use_is_returned(kilobytes: int) -> None:
    """Arrays that are too small to be mapped one by one. Every fourth stays in use."""
    return_freed()
    arrays = [np.ones(kilobytes << 10, np.uint8) for _ in range((64 << 10) // kilobytes)]
    full = used_memory()
    kept = arrays[::4]
    del arrays
    fragmented = used_memory()
    assert fragmented > full - (16 << 20)
    return_freed()
    assert used_memory() < fragmented - (32 << 20)
    assert all(array.all() for array in kept)


LARGE_ARRAYS = """
from pathlib import Path
import numpy as np
from rq_compile.calibration.scratch import return_large_arrays_when_freed

def used():
    return int(Path("/proc/self/statm").read_text().split()[1]) >> 8

{setting}
np.ones(31 << 20, np.uint8)  # freed: from here on, glibc keeps arrays of this size by default
arrays, kept = [], []
for _ in range(8):
    arrays.append(np.ones({megabytes} << 20, np.uint8))
    kept.append(np.ones(1 << 16, np.uint8))
full = used()
del arrays
print(full - used())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has the setting")
@pytest.mark.parametrize("megabytes", [16, 25])
def test_large_arrays_are_returned_when_they_are_freed(megabytes: int) -> None:
    """Those that are freed between arrays in use, too. In processes of their own, because the setting stays."""

    def returned(setting: str) -> int:
        program = LARGE_ARRAYS.format(setting=setting, megabytes=megabytes)
        return int(subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True).stdout)

    assert returned("return_large_arrays_when_freed()") >= 8 * megabytes - 2
    assert returned("") < 4 * megabytes


SMALL_ARRAYS = """
from resource import RUSAGE_SELF, getrusage
import numpy as np
from rq_compile.calibration.scratch import return_large_arrays_when_freed

return_large_arrays_when_freed()
before = getrusage(RUSAGE_SELF).ru_minflt
for _ in range(50):
    np.ones(2 << 20, np.uint8)
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has the setting")
def test_the_memory_of_smaller_arrays_is_not_cleared_again() -> None:
    """Two of fifty arrays may be of new pages. With the limit for large arrays alone, all were."""
    found = subprocess.run([sys.executable, "-P", "-c", SMALL_ARRAYS], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 2 * ((2 << 20) // 4096)
