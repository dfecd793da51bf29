"""Where an engine's time goes, by op, from ONNX Runtime's own profile."""

import json
import tempfile
from bisect import bisect
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime

from rq_compile.engine.library import library_path
from rq_compile.engine.manifest import Manifest
from rq_compile.runtime.files import read_manifest

CONTAINERS = ("If", "Loop")


@dataclass(frozen=True)
class OpTime:
    """The nodes of one op in one run: their number, their microseconds, and their ``share`` of the time of all nodes."""

    op: str
    nodes: float
    microseconds: float
    share: float


def op_times(engine: Path, tokens: int, past: int, runs: int, threads: int) -> list[OpTime]:
    """The slowest op first, by medians of ``runs`` on ``tokens`` random tokens of one sequence after ``past`` others.

    One warm-up run comes first. For a node that contains others (``If``), the contained nodes are counted.
    """
    manifest = read_manifest(engine)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if manifest.op_library is not None:
        options.register_custom_ops_library(str(library_path()))
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])
        known = {graph_input.name for graph_input in session.get_inputs()}
        feeds = {name: value for name, value in _feeds(manifest, tokens, past).items() if name in known}
        for _ in range(runs + 1):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    began = sorted(event["ts"] for event in events if event["name"] == "model_run")[1:]
    nodes, microseconds = Counter[str](), defaultdict[str, list[float]](lambda: [0.0] * runs)
    for event in events:
        run = bisect(began, event["ts"]) - 1
        if run >= 0 and event["name"].endswith("_kernel_time") and event["args"]["op_name"] not in CONTAINERS:
            nodes[event["args"]["op_name"]] += 1
            microseconds[event["args"]["op_name"]][run] += event["dur"]
    medians = {op: median(times) for op, times in microseconds.items()}
    total = sum(medians.values())
    slowest_first = sorted(medians, key=lambda op: -medians[op])
    return [OpTime(op, nodes[op] / runs, medians[op], medians[op] / total) for op in slowest_first]


def _feeds(manifest: Manifest, tokens: int, past: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = {"batch": 1, "past": past}
    cache = {
        tensor.past: random.standard_normal([size if isinstance(size, int) else sizes[size] for size in tensor.shape], np.float32)
        for tensor in manifest.cache
    }
    return {
        "input_ids": random.integers(0, manifest.vocabulary, (1, tokens)),
        "attention_mask": np.ones((1, past + tokens), np.int64),
        "position_ids": np.arange(past, past + tokens)[None],
        **cache,
    }
