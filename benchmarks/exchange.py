"""What the exchange of a layer costs between two ranks of one host, for ``cpu`` in planning/targets.py.

Each row is the time of both ops, there and back: the latency of the messages with one token, bytes per second with many.

    python benchmarks/exchange.py
"""

import argparse
import json
import time
from statistics import median
from typing import Any

import numpy as np
from provenance import origin
from rank_processes import bind, mpirun

RANKS = 2


def exchange_rank(repeats: int = 1000) -> None:
    """Prints seconds of a step without rows to exchange, and bytes per second with many, for two ranks of one host."""
    import onnxruntime
    from onnx import TensorProto, helper

    from rq_compile.engine.library import MPI_LIBRARY, library_path
    from rq_compile.engine.ranks import ranks

    world = ranks()
    bind(world.rank)
    described = [
        ("x", TensorProto.FLOAT, 2),
        ("ids", TensorProto.INT64, 2),
        ("replicas", TensorProto.INT32, 2),
        ("idle", TensorProto.INT64, 1),
    ]
    inputs = [helper.make_tensor_value_info(name, kind, [None] * rank) for name, kind, rank in described]
    outputs = [helper.make_tensor_value_info("back", TensorProto.FLOAT, [None, None])]
    made = ["arrived", "rows", "offsets", "outgoing", "exchanged"]
    experts = 64
    options: dict[str, Any] = {
        "domain": "rq.moe.mpi",
        "ranks": [e * world.size // experts for e in range(experts)],
        "rank": world.rank,
        "size": world.size,
    }
    nodes = [
        helper.make_node("ExchangeDispatch", ["x", "ids", "replicas", "idle"], made, **options),
        helper.make_node("ExchangeReturn", ["arrived", "rows", "outgoing", "exchanged"], ["back"], domain="rq.moe.mpi"),
    ]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("rq.moe.mpi", 2)]
    model = helper.make_model(helper.make_graph(nodes, "exchange", inputs, outputs), opset_imports=imports, ir_version=10)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = 1
    session_options.register_custom_ops_library(str(library_path(MPI_LIBRARY)))
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options, providers=["CPUExecutionProvider"])
    replicas = np.arange(experts, dtype=np.int32)[:, None]
    for hidden, tokens in ((2048, 1), (2048, 16), (2048, 256), (4096, 256), (256, 256)):
        # Half of the pairs stay, half leave: 4 of 8 of each token.
        ids = np.tile(np.arange(8) * 8, (tokens, 1)).astype(np.int64)
        feeds = {"x": np.ones((tokens, hidden), np.float32), "ids": ids, "replicas": replicas, "idle": np.zeros(1, np.int64)}
        took = []
        for _ in range(repeats if tokens == 1 else repeats // 20):
            world.any(True)
            start = time.perf_counter()
            session.run(None, feeds)
            took.append(max(world.gather(time.perf_counter() - start)))
        sent = tokens * 4 * hidden * 4
        if world.rank == 0:
            print(
                json.dumps(
                    {
                        "hidden": hidden,
                        "tokens": tokens,
                        "bytes_sent_each_way": sent,
                        "microseconds": round(1e6 * median(took), 2),
                        **origin(),
                    }
                )
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-rank", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().in_rank:
        exchange_rank()
    else:
        mpirun(RANKS, __file__, "--in-rank")


if __name__ == "__main__":
    main()
