"""What TensorRT-RTX builds from a model, on a machine without a GPU, and the error of the network's 16 bits, in ONNX Runtime.

For each set of profiles: seconds to build, and bytes of the engine, of its weights and of the scratch memory that it needs. Two
lowerings are compared with transformers on ``--text``, both with the same plan: the CPU's engine in fp32 (lowering batched), and
the network that the builder receives (fp16, int8 with a scale for each column).

    rq-compile calibrate samples/olmoe --text samples/text/hacker.calibration.txt -o calibration.json
    rq-compile plan calibration.json --target tensorrt-rtx --memory 0.6 -o plan.json
    python benchmarks/tensorrt.py samples/olmoe --plan plan.json --text samples/text/scripture.heldout.txt \\
        -o benchmarks/results/tensorrt.json
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from provenance import write_rows

from rq_compile.architectures.model import Model
from rq_compile.calibration.statistics import Statistics
from rq_compile.evaluation.divergence import Divergence
from rq_compile.export.export import export_graph
from rq_compile.files import read_document
from rq_compile.planning.schema import Plan
from rq_compile.rewrite.logits_to_keep import FIRST_ROW
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine
from rq_compile.targets.tensorrt.compile import Settings, compile_tensorrt
from rq_compile.targets.tensorrt.manifest import TensorRTManifest
from rq_compile.targets.tensorrt.profiles import default_profiles

Logits = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the text, in sequences of 256")
    parser.add_argument("--sm", type=int, default=89)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    checkpoint, plan = Model.open(arguments.model), read_document(Plan, arguments.plan)
    statistics = Statistics.beside(arguments.plan.parent, plan.statistics) if plan.statistics else None
    exported = export_graph(checkpoint)
    both = default_profiles(8, 256, checkpoint.config.get("max_position_embeddings"))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for profiles, what in ((both[1:], "decoding"), (both, "prompts and decoding")):
            settings = Settings("rtx", profiles, [arguments.sm])
            engine = compile_tensorrt(checkpoint, plan, folder / "e.plan", settings, statistics=statistics, exported=exported)
            rows.append(built_row(what, engine))
            print(rows[-1], flush=True)
        unbuilt = Settings("rtx", both, [arguments.sm], build=False)
        compile_tensorrt(checkpoint, plan, folder / "n.plan", unbuilt, statistics=statistics, exported=exported)
        for_cpu = plan.model_copy(update={"target": "batched"})
        compile_engine(checkpoint, for_cpu, folder / "cpu.onnx", "batched", statistics, exported)
        reference, cpu = Reference.load(checkpoint), Engine.load(folder / "cpu.onnx")
        ids = np.array(cpu.tokenizer.encode(arguments.text.read_text()).ids[: arguments.tokens]).reshape(-1, 256)
        for what, logits in (("fp32 engine", cpu.logits), ("fp16 network", network(folder / "n.network.onnx"))):
            rows.append({"what": what, "memory": plan.memory, **compared(reference.logits, logits, ids)})
            print(rows[-1], flush=True)
    if arguments.output:
        write_rows(arguments.output, rows)


def built_row(what: str, engine: TensorRTManifest) -> dict[str, Any]:
    built = engine.built
    assert built is not None
    return {
        "what": what,
        "builder": built.builder,
        "compute_capabilities": built.compute_capabilities,
        "build_seconds": built.build_seconds,
        "engine_bytes": built.bytes,
        "weight_bytes": built.weight_bytes,
        "scratch_bytes": built.scratch_bytes,
        "layers": built.engine_layers,
    }


def network(path: Path) -> Logits:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name == FIRST_ROW:  # so that the logits are those of all tokens, not only of the last
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([0]), FIRST_ROW))
    every = path.with_name(f"every-{path.name}")
    onnx.save(model, every)
    session = onnxruntime.InferenceSession(str(every), providers=["CPUExecutionProvider"])

    def logits(ids: np.ndarray) -> np.ndarray:
        batch, length = ids.shape
        known = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.tile(np.arange(length), (batch, 1)),
        }
        feeds = {value.name: known[value.name] for value in session.get_inputs() if value.name in known}
        for value in session.get_inputs():
            if value.name not in known:
                feeds[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float16)
        return session.run(["logits"], feeds)[0]

    return logits


def compared(reference: Logits, other: Logits, ids: np.ndarray) -> dict[str, float]:
    divergence = Divergence()
    for sequence in ids:
        wanted, found = (logits(sequence[None])[0, :-1] for logits in (reference, other))
        divergence.add(wanted, found, sequence[1:])
    return {
        "agreement": divergence.agreement,
        "perplexity_transformers": divergence.perplexity_reference,
        "perplexity": divergence.perplexity_engine,
    }


if __name__ == "__main__":
    main()
