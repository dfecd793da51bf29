"""Runs the processes of an engine of several ranks: oversubscribed, with one thread each."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import PACKAGED_IN, safe_path

from rq_compile.engine.library import MPI_LIBRARY
from rq_compile.planning.schema import LayerPlan, Plan, Slot

# Of the MPI that the library was built with: that of the environment comes before one of the system.
FOUND_IN = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
MPIRUN = shutil.which("mpiexec", path=FOUND_IN)
BUILT = (PACKAGED_IN / "rq_compile" / "lib" / MPI_LIBRARY).is_file()

# Open MPI otherwise refuses more processes than cores (its versions 5 and 4), and to be run as root. MPICH ignores these.
OPEN_MPI = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}

needs_mpi = pytest.mark.skipif(
    not (BUILT and MPIRUN), reason="librq_moe_mpi.so is not built (make mpi-ops) or there is no mpiexec"
)
needs_mpich = pytest.mark.skipif(not shutil.which("mpichversion", path=FOUND_IN), reason="the MPI is not MPICH")


def mpirun(ranks: int, *arguments: object, limit: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` on as many processes, ended after ``limit`` seconds."""
    program = [sys.executable, *safe_path(str(arguments[0])), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGED_IN), "OMP_NUM_THREADS": "1"} | OPEN_MPI | variables
    return subprocess.run(
        [MPIRUN or "mpiexec", "-n", str(ranks), *program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )


def spread(plan: Plan, ranks: int, rank_of: Callable[[LayerPlan, int, Slot], int]) -> Plan:
    """The plan with each slot on the rank ``rank_of(layer, slot number, slot)``."""
    layers = [
        layer.model_copy(
            update={"slots": [slot.model_copy(update={"rank": rank_of(layer, i, slot)}) for i, slot in enumerate(layer.slots)]}
        )
        for layer in plan.layers
    ]
    return plan.model_copy(update={"ranks": ranks, "layers": layers})
