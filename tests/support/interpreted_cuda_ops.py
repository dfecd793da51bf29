"""MoeLayer in ONNX Runtime, its launches computed by Triton's interpreter: test_cuda_ops.py runs this file.

RQ_HOST is the library of cuda_ops_on_host.cc, RQ_LIBRARY is librq_moe_cuda.so; for the others see interpreted_launches.py.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from interpreted_launches import CASES, DRIVER, LAUNCHED, SEED, Launches, batch, example
from rq_kernels import reference

sys.path.append(str(Path(__file__).parents[2] / "plugins" / "cuda"))

import check_in_onnxruntime
from check_in_onnxruntime import arrays_of, attributes_of
from node_model import feeds_of, model_of, session_of

LIBRARY = os.environ["RQ_HOST"]
HOST = ctypes.CDLL(LIBRARY)
HOST.the_stream.restype = DRIVER.stream_of_last_launch.restype = ctypes.c_void_p
HOST.scratch_taken.restype = HOST.scratch_held.restype = ctypes.c_size_t


@pytest.fixture
def stream() -> Iterator[int]:
    """The node's stream, as under the CUDA provider."""
    HOST.on_stream(True)
    yield HOST.the_stream()
    HOST.on_stream(False)


def session_for(layer: Any, arrays: Any, **options: Any) -> onnxruntime.InferenceSession:
    return session_of(model_of(arrays, **attributes_of(layer), **options), LIBRARY)


def close(out: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, held: Any) -> bool:
    expected = reference.moe_layer(x, ids, gates, held)
    return bool((out.double() - expected).abs().max() < 2e-3 * expected.abs().max())


def answer(session: onnxruntime.InferenceSession, arrays: Any, launches: Any) -> torch.Tensor:
    out = session.run(None, feeds_of(session, arrays))[0]
    if launches.failure:
        raise launches.failure
    return torch.from_numpy(out)


# The largest are tested with the TensorRT plugin, which launches them with the same code.
@pytest.mark.parametrize("case", [case for case in CASES if "prefill" not in case])
def test_the_layer_against_float64(case: Any, stream: int) -> None:
    options: Any
    tokens, top_k, size, dispatch, options = CASES[case]
    random = torch.Generator().manual_seed(SEED)
    held = example(random, **options)
    held = replace(held, layer=replace(held.layer, limit=0.8))
    x, ids, gates = batch(held.layer, tokens, top_k, random)
    if top_k == 3:
        ids[::3, 0] = -1  # another rank's
    arrays = arrays_of(held.layer, x, ids, gates)
    launches, before = Launches(), HOST.scratch_taken()
    session = session_for(held.layer, arrays)
    out = answer(session, arrays, launches)
    assert [name for name, *_ in launches.seen] == [
        *dispatch, f"up_gated_fp16_{size}", f"down_fp16_{size}", "combine_fp16"
    ]  # fmt: skip
    assert DRIVER.stream_of_last_launch() == stream
    assert (HOST.scratch_taken() - before, HOST.scratch_held()) == (1, 0)
    assert close(out, x, ids, gates, held), f"seed {SEED}"


def test_one_session_takes_batches_of_any_size_and_none() -> None:
    """Without a stream of ONNX Runtime's own."""
    random = torch.Generator().manual_seed(SEED)
    held = example(random, hidden=128, intermediate=64)
    session = session_for(held.layer, arrays_of(held.layer, *batch(held.layer, 1, 2, random)))
    assert session.get_outputs()[0].shape == ["T", 128]
    launches, loaded = Launches(sm=86), DRIVER.modules_loaded()
    for tokens in (3, 0, 1, 8):
        x, ids, gates = batch(held.layer, tokens, 2, random)
        launches.seen.clear()
        out = answer(session, arrays_of(held.layer, x, ids, gates), launches)
        assert out.shape == x.shape
        assert len(launches.seen) == (4 if tokens else 0)
        assert tokens == 0 or close(out, x, ids, gates, held), f"seed {SEED}"
    assert DRIVER.modules_loaded() - loaded == 11, "a layer's kernels are loaded once"


def test_weights_may_be_inputs_of_shapes_that_the_graph_does_not_know() -> None:
    random = torch.Generator().manual_seed(SEED)
    session = None
    for hidden, intermediate in ((128, 64), (64, 128), (128, 64)):
        held = example(random, hidden=hidden, intermediate=intermediate)
        x, ids, gates = batch(held.layer, 5, 2, random)
        arrays = arrays_of(held.layer, x, ids, gates)
        session = session or session_for(held.layer, arrays, shapes=False)
        assert close(answer(session, arrays, Launches()), x, ids, gates, held), f"seed {SEED}"


def test_threads_share_a_session(stream: int) -> None:
    """Nothing is computed. This only checks that each run launches its four kernels and returns its memory."""
    random = torch.Generator().manual_seed(SEED)
    held = example(random)
    arrays = arrays_of(held.layer, *batch(held.layer, 9, 2, random))
    session = session_for(held.layer, arrays)
    launches = Launches(compute=False)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: answer(session, arrays, launches), range(64)))
    assert (len(launches.seen), HOST.scratch_held()) == (4 * 64, 0)


def refused(session: onnxruntime.InferenceSession, arrays: Any) -> str:
    with pytest.raises(Exception, match=r"rq.moe MoeLayer: ") as refusal:
        session.run(None, feeds_of(session, arrays))
    return str(refusal.value)


def test_failures_of_the_driver_are_told(stream: int) -> None:
    random = torch.Generator().manual_seed(SEED)
    held = example(random)
    arrays = arrays_of(held.layer, *batch(held.layer, 3, 2, random))
    function = LAUNCHED(lambda *_: 1)
    DRIVER.stand_in(80, function)
    assert "dispatch_small: the stand-in refuses" in refused(session_for(held.layer, arrays), arrays)
    assert HOST.scratch_held() == 0
    DRIVER.stand_in(75, function)
    assert "dispatch_count was not built for SM 75" in refused(session_for(held.layer, arrays), arrays)


def test_a_batch_whose_inputs_disagree_is_refused() -> None:
    random = torch.Generator().manual_seed(SEED)
    held = example(random)
    x, *rest = arrays_of(held.layer, *batch(held.layer, 3, 2, random))
    session = session_for(held.layer, [x, *rest])
    launches = Launches(compute=False)
    assert "x, ids and gates are of different numbers of tokens" in refused(session, [x, rest[0][:2], *rest[1:]])
    shifted = np.zeros(x.size + 1, np.float16)[1:].reshape(x.shape)
    assert "x begins at an address that is not a multiple of 16 bytes" in refused(session, [shifted, *rest])
    assert not launches.seen


def test_the_check_for_a_gpu_says_what_is_right_and_what_is_wrong(stream: int, capsys: pytest.CaptureFixture[str]) -> None:
    launches = Launches()
    arguments = [LIBRARY, "--provider", "CPUExecutionProvider", "--seed", str(SEED)]
    assert check_in_onnxruntime.main([*arguments, "--only", "o"]) == 1
    said = capsys.readouterr().out
    assert "ok      one token" in said
    assert "ok      no token" in said
    assert "FAILED  float bf16: " in said  # not built
    launches.compute = False
    assert check_in_onnxruntime.main([*arguments, "--only", "one token"]) == 1
    assert "FAILED  one token" in capsys.readouterr().out
