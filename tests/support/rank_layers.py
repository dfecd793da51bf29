"""One rank of random layers without experts, for test_ranks.py: what arrives, from whom, and what comes back.

A simulation of all ranks in NumPy says what is expected. The slots, the rows of each rank and the loads of the experts vary.

With the argument "fail", rank 1 fails after some steps; with "unread", while nobody reads its output any more.
"""

import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from rq_compile.engine.library import MPI_LIBRARY, library_path
from rq_compile.engine.ranks import ranks

CASES = 60
ME, SIZE = ranks().rank, ranks().size
INPUTS = [("x", TensorProto.FLOAT, 2), ("ids", TensorProto.INT64, 2), ("replicas", TensorProto.INT32, 2)]
INPUTS += [("idle", TensorProto.INT64, 1)]
INT32 = [("offsets", TensorProto.INT32, 1), ("outgoing", TensorProto.INT32, 1), ("exchanged", TensorProto.INT32, 2)]
OUTPUTS = [("y", TensorProto.FLOAT, 2), *INT32, ("back", TensorProto.FLOAT, 2)]
Step = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def layer(rank_of_slot: list[int]) -> Step:
    """A layer whose experts return what they get."""
    dispatched = ["arrived", "rows", "offsets", "outgoing", "exchanged"]
    options: dict[str, Any] = {"domain": "rq.moe.mpi", "ranks": rank_of_slot, "rank": ME, "size": SIZE}
    nodes = [
        helper.make_node("ExchangeDispatch", ["x", "ids", "replicas", "idle"], dispatched, **options),
        helper.make_node("Gather", ["arrived", "rows"], ["y"]),
        helper.make_node("ExchangeReturn", ["y", "rows", "outgoing", "exchanged"], ["back"], domain="rq.moe.mpi"),
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, kind, [None] * rank) for name, kind, rank in some] for some in (INPUTS, OUTPUTS)
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("rq.moe.mpi", 2)]
    model = helper.make_model(helper.make_graph(nodes, "layer", inputs, outputs), opset_imports=imports, ir_version=10)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = 1
    session_options.register_custom_ops_library(str(library_path(MPI_LIBRARY)))
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run([name for name, _, _ in OUTPUTS], feeds)


def case(seed: int) -> tuple[Step, dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    experts, top_k, hidden = random.integers(1, 9), random.integers(1, 4), random.integers(1, 20)
    slots = np.concatenate([np.arange(experts), random.integers(0, experts, random.integers(0, 6))])
    random.shuffle(slots)
    rank_of_slot = random.integers(0, SIZE, len(slots))
    copies = [np.flatnonzero(slots == expert) for expert in range(experts)]
    replicas = np.full((experts, max(map(len, copies))), -1, np.int32)
    for expert, held in enumerate(copies):
        replicas[expert, : len(held)] = held
    tokens = random.integers(0, 30, SIZE) * random.integers(0, 2, SIZE)
    x = [random.standard_normal((max(1, count), hidden), np.float32) for count in tokens]
    ids = [(random.random((max(1, count), top_k)) ** 3 * experts).astype(np.int64) for count in tokens]

    step = layer(rank_of_slot.tolist())
    feeds: dict[str, np.ndarray] = {
        "x": x[ME],
        "ids": ids[ME],
        "replicas": replicas,
        "idle": np.array([tokens[ME] == 0], np.int64),
    }
    y, offsets, outgoing, exchanged, back = step(feeds)

    taken, sent = np.zeros(experts, int), np.zeros((SIZE, SIZE), int)
    arriving: list[list[np.ndarray]] = [[] for _ in slots]
    for rank in range(SIZE):
        for token in range(tokens[rank]):
            for expert in ids[rank][token]:
                slot = copies[expert][taken[expert] % len(copies[expert])]
                taken[expert] += 1
                arriving[slot].append(x[rank][token])
                sent[rank, rank_of_slot[slot]] += 1
    mine = [arriving[slot] for slot in range(len(slots)) if rank_of_slot[slot] == ME]
    assert np.diff(offsets).tolist() == [len(rows) for rows in mine]
    assert np.array_equal(y, np.array([row for rows in mine for row in rows], np.float32).reshape(len(y), hidden))
    assert exchanged.tolist() == [sent[ME].tolist(), sent[:, ME].tolist()]
    assert sorted(outgoing) == list(range(len(back)))
    assert np.array_equal(back, x[ME][outgoing // top_k] if tokens[ME] else np.zeros_like(back))
    return step, feeds


def peak_after(steps: int, step: Step, feeds: dict[str, np.ndarray]) -> int:
    for _ in range(steps):
        step(feeds)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


for number in range(CASES):
    last = case(number)
if "unread" in sys.argv and ME == 1:
    reading, writing = os.pipe()
    os.close(reading)
    sys.stdout = os.fdopen(writing, "w")
    print("this is still buffered when the rank fails")
if len(sys.argv) > 1 and ME == 1:
    raise ValueError("the second rank gives up")
assert peak_after(200, *last) == peak_after(2000, *last)
