"""``librq_quantizer.so``, which ``plugins/quantizer`` builds: rounding by GPTQ, and the decoding of quantized weights."""

import ctypes
from functools import cache
from pathlib import Path

import rq_compile
from rq_compile.errors import UserError

LIBRARY = Path(rq_compile.__file__).parent / "lib" / "librq_quantizer.so"


@cache
def quantizer_library() -> ctypes.CDLL:
    """
    Raises:
        UserError: the library was not built, or was built for another machine or from older sources.
    """
    try:
        library = ctypes.CDLL(str(LIBRARY))
        if not hasattr(library, "rq_decode"):
            raise OSError
    except OSError as error:
        raise UserError(f"the quantizer {LIBRARY} is missing, too old or not for this machine; run pip install .", 2) from error
    return library
