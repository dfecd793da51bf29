"""Where the custom-op library of the `native` lowering is."""

from pathlib import Path

import rq_compile
from rq_compile.errors import UserError

OP_SET_VERSION = 1


def library_path() -> Path:
    """The custom-op library ``librq_moe.so`` that was built with this package.

    Raises:
        UserError: the package was installed without its library.
    """
    path = Path(rq_compile.__file__).parent / "lib" / "librq_moe.so"
    if not path.is_file():
        raise UserError(f"the custom-op library {path} is missing; run pip install . or use --lowering stock", 2)
    return path
