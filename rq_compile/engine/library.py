"""The paths of the custom-op libraries of the lowerings `native`, `ranks` and `cuda`."""

from pathlib import Path
from typing import Literal

import rq_compile
from rq_compile.errors import UserError

OpLibrary = Literal["librq_moe.so", "librq_moe_cuda.so", "librq_moe_mpi.so"]
OP_SET_VERSION = 6
# The format groups of the op set. The index of a group is the format code of its slots. A node has as inputs, in this order,
# the tensors of the groups that its slots are in. New groups are added at the end, so that existing nodes keep their meaning.
# The same table is in plugins/format_groups.h and plugins/kernels/rq_kernels/formats.py.
FORMAT_GROUPS = ("float", "int8", "int4", "mxfp4", "fp8", "int3", "int2")
CPU_LIBRARY: OpLibrary = "librq_moe.so"
CUDA_LIBRARY: OpLibrary = "librq_moe_cuda.so"
MPI_LIBRARY: OpLibrary = "librq_moe_mpi.so"
# How to get a missing library.
WAYS_OUT: dict[OpLibrary, str] = {
    CPU_LIBRARY: "run pip install . or use --lowering stock",
    CUDA_LIBRARY: "build it as plugins/cuda/README.md says and put it there",
    MPI_LIBRARY: "build it where MPI is installed with make mpi-ops, or compile to an .onnx file, which one process runs",
}


def library_path(name: OpLibrary = CPU_LIBRARY) -> Path:
    """The path of the custom-op library ``name`` in the package. ``librq_moe.so`` is built together with the package.

    Raises:
        UserError: the library is missing.
    """
    path = Path(rq_compile.__file__).parent / "lib" / name
    if not path.is_file():
        raise UserError(f"the custom-op library {path} is missing; {WAYS_OUT[name]}", 2)
    return path
