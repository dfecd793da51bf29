"""``librq_quantizer.so``, which ``plugins/quantizer`` builds: rounding by GPTQ, the decoding of quantized weights, and sums
over weights."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import rq_compile
from rq_compile.errors import UserError

LIBRARY = Path(rq_compile.__file__).parent / "lib" / "librq_quantizer.so"


@cache
def quantizer_function(name: str) -> Any:
    """The function ``name`` of the library.

    Raises:
        UserError: the library was not built, or was built for another machine or from older sources.
    """
    try:
        return getattr(ctypes.CDLL(str(LIBRARY)), name)
    except (OSError, AttributeError) as error:
        raise UserError(f"the quantizer {LIBRARY} is missing, too old or not for this machine; run pip install .", 2) from error
