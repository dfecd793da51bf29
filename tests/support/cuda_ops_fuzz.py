"""Random MoeLayer nodes give a result or an error of the session, never a crash. test_cuda_ops.py runs this file.

    python cuda_ops_fuzz.py SEED COUNT      with RQ_HOST, RQ_LIBRARY (preferably built with sanitizers) and RQ_STAND_IN

Prints the numbers of accepted nodes and of batches that were run.
"""

import ctypes
import os
import sys
from typing import Any

import numpy as np
from layer_arrays import arrays_of
from node_model import feeds_of, model_of, session_of

LAUNCHED = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p)
DRIVER = ctypes.CDLL(os.environ["RQ_STAND_IN"], mode=ctypes.RTLD_GLOBAL)
NOTHING = LAUNCHED(lambda *_: 0)
DRIVER.stand_in(80, NOTHING)


def attributes(random: np.random.Generator, formats: list[int]) -> dict[str, Any]:
    said: dict[str, Any] = {"formats": formats, "activation": str(random.choice(["none", "swiglu", "geglu", "relu", "gelu"]))}
    wrong: list[Any] = [
        0,
        1.5,
        "swiglu",
        [0, 1, 9],
        [0.5, 0.5],
        [2**40] * len(formats),
        [float("nan")] * len(formats),
        [-1] * 3,
        "",
    ]
    for name in random.choice(["formats", "activation", "alpha", "limit", "shares", "other"], random.choice([0, 0, 0, 1, 2])):
        said[str(name)] = wrong[random.integers(len(wrong))]
    if random.integers(20) == 0:
        del said[str(random.choice(list(said)))]
    return said


def inputs(random: np.random.Generator, formats: list[int], gated: bool) -> Any:
    tokens, block = int(random.choice([0, 1, 5, 600])), int(random.choice([64, 64, 128, 48]))
    sizes = {"hidden": int(random.choice([64, 128, 128, 72])), "intermediate": int(random.choice([32, 64]))}
    arrays = arrays_of(formats, tokens, **sizes, block=block, gated=gated, bias=bool(random.integers(2)))
    for _ in range(random.choice([0, 0, 0, 1, 2])):
        place = random.integers(len(arrays))
        shape = list(arrays[place].shape)
        change = random.integers(4)
        if change == 0 and shape:
            shape[random.integers(len(shape))] = int(random.choice([0, 1, 3, 16, 129]))
        elif change == 1:
            shape = [1] * int(random.integers(6))
        elif change == 2:
            del arrays[place]
            continue
        kind = random.choice([arrays[place].dtype, arrays[place].dtype, np.dtype(np.float32)])
        arrays[place] = np.zeros(shape, kind)
    return arrays


def main(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    taken = ran = 0
    for _ in range(count):
        formats = random.choice([0, 1, 2, 5, 6], random.integers(2, 6)).tolist()
        said = attributes(random, formats)
        arrays = inputs(random, formats, "glu" in str(said.get("activation")))
        try:
            session = session_of(model_of(arrays, shapes=bool(random.integers(2)), **said), os.environ["RQ_HOST"])
            taken += 1
            session.run(None, feeds_of(session, arrays))
            ran += 1
        except Exception as error:
            text = str(error)
            assert "rq.moe MoeLayer" in text or "invalid model" in text or "INVALID_ARGUMENT" in text, text
    print(taken, ran)


main(int(sys.argv[1]), int(sys.argv[2]))
