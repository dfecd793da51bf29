"""Where the custom-op libraries of the lowerings `native` and `cuda` are."""

from pathlib import Path
from typing import Literal

import rq_compile
from rq_compile.errors import UserError

OpLibrary = Literal["librq_moe.so", "librq_moe_cuda.so"]
OP_SET_VERSION = 1
# Of the op set: slots are told apart by the place of their format's group here, and the ops have inputs for each in this order.
FORMAT_GROUPS = ("float", "int8", "int4")
CPU_LIBRARY: OpLibrary = "librq_moe.so"
CUDA_LIBRARY: OpLibrary = "librq_moe_cuda.so"
# How a missing one is got.
WAYS_OUT: dict[OpLibrary, str] = {
    CPU_LIBRARY: "run pip install . or use --lowering stock",
    CUDA_LIBRARY: "build it as plugins/cuda/README.md says and put it there",
}


def library_path(name: OpLibrary = CPU_LIBRARY) -> Path:
    """The custom-op library of this name in the package; ``librq_moe.so`` is built with it.

    Raises:
        UserError: it is not there.
    """
    path = Path(rq_compile.__file__).parent / "lib" / name
    if not path.is_file():
        raise UserError(f"the custom-op library {path} is missing; {WAYS_OUT[name]}", 2)
    return path
