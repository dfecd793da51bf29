"""One MoE layer in llama.cpp, from the library that llama_cpp/build.py makes.

llama.cpp keeps integers in blocks of 32 with an fp16 scale each: 8.5 bits per weight (Q8_0) and 4.5 (Q4_0). Our formats take 8.25
and 4.25 in blocks of 128. llama.cpp is given our integers, so that both compute the same layer, up to the rounding of the scales.
As in a model, it rearranges Q4_0 for its kernels if it has kernels for the instructions of this machine.
"""

import ctypes
import weakref
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np

from rq_compile.quantization.formats import Format
from rq_compile.quantization.packing import Quantized, whole_numbers

NAMES: dict[str, str] = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}  # of the formats that llama.cpp also has
BLOCK = 32


def library(folder: Path) -> ctypes.CDLL | None:
    """The library that ``llama_cpp/build.py --folder`` built in ``folder``, or None."""
    path = folder / "build" / "libllama_cpp_layer.so"
    if not path.is_file():
        return None
    found = ctypes.CDLL(str(path))
    found.layer_new.argtypes = [c_char_p, c_int64, c_int64, c_int64, c_int64, c_int]
    found.layer_new.restype = c_void_p
    found.layer_set.argtypes = [c_void_p, c_char_p, c_void_p]
    found.layer_set.restype = None
    found.layer_run.argtypes = [c_void_p, c_int64, POINTER(c_float), POINTER(c_int32), POINTER(c_float), POINTER(c_float)]
    found.layer_run.restype = c_bool
    found.layer_free.argtypes = [c_void_p]
    found.layer_free.restype = None
    return found


def blocks(quantized: Quantized, format: Format) -> np.ndarray:
    """The matrix as Q8_0 ("int8") or Q4_0 ("int4"): uint8 ``[rows, columns / 32, 2 + 32 or 2 + 16]``; whole blocks only."""
    numbers = whole_numbers(quantized, format).reshape(len(quantized.scales), -1, BLOCK)
    if format == "int4":
        low, high = np.split((numbers + 8).view(np.uint8), 2, axis=-1)
        numbers = low | high << 4
    repeats = numbers.shape[1] // quantized.scales.shape[1]
    scales = np.repeat(quantized.scales, repeats, axis=1).astype("<f2")[..., None]
    return np.concatenate([scales.view(np.uint8), numbers.view(np.uint8)], axis=-1)


class LlamaCppLayer:
    """A SwiGLU layer whose threads sleep between two runs."""

    def __init__(
        self, library: ctypes.CDLL, format: str, hidden: int, intermediate: int, experts: int, top_k: int, threads: int
    ) -> None:
        """
        Raises:
            MemoryError: ggml cannot allocate the weights.
        """
        self._library = library
        self._layer = library.layer_new(NAMES[format].lower().encode(), hidden, intermediate, experts, top_k, threads)
        if not self._layer:
            raise MemoryError(f"ggml has no memory for {experts} experts in {NAMES[format]}")
        weakref.finalize(self, library.layer_free, self._layer)

    def set_weights(self, name: str, matrix: np.ndarray) -> None:
        """All experts' "gate" or "linear" ``[E, I, H]``, or "down" ``[E, H, I]``: fp32, or the ``blocks`` of each row."""
        matrix = np.ascontiguousarray(matrix)
        self._library.layer_set(self._layer, name.encode(), matrix.ctypes.data)

    def run(self, x: np.ndarray, ids: np.ndarray, gates: np.ndarray) -> np.ndarray:
        """fp32 ``[T, H]`` from fp32 ``x [T, H]``, integers ``ids [T, k]`` and fp32 ``gates [T, k]``."""
        y = np.empty_like(x)
        ids = ids.astype(np.int32)
        floats = [array.ctypes.data_as(POINTER(c_float)) for array in (x, gates, y)]
        if not self._library.layer_run(self._layer, len(x), floats[0], ids.ctypes.data_as(POINTER(c_int32)), *floats[1:]):
            raise MemoryError(f"ggml could not compute {len(x)} tokens")
        return y
