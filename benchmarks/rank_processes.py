"""The processes of benchmarks with several ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path


def bind(rank: int) -> None:
    """One core for each rank, as ``mpirun --bind-to core`` would."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def mpirun(ranks: int, *arguments: object, limit: float = 160) -> None:
    """``python ARGUMENTS`` on as many processes. They are killed after ``limit`` seconds: ranks that wait for one that died would
    wait forever.

    Raises:
        CalledProcessError: a rank failed.
        TimeoutExpired: they took longer.
    """
    mpiexec = Path(sys.executable).with_name("mpiexec")
    program = [str(mpiexec) if mpiexec.exists() else "mpiexec", "-n", str(ranks), sys.executable, *map(str, arguments)]
    with subprocess.Popen(program, start_new_session=True) as started:
        try:
            started.wait(limit)
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
    if started.returncode:
        raise subprocess.CalledProcessError(started.returncode, program)
