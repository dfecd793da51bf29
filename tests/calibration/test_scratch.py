"""Memory that a calibration returns to the system."""

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
