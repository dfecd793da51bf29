"""Whole models on the CPU against llama.cpp, OpenVINO and onnxruntime-genai, from the same checkpoint and with as many bits.

Each runtime is a process of its own, with its own Python packages (``benchmarks/runtimes/``). They take turns, each after a pause
in which the threads of the one before go to sleep. A round is the prefill of a random prompt, then greedy decoding. Figures are
medians of the rounds after the first.

Models: Qwen3-30B-A3B's and OLMoE-1B-7B's widths with three layers, half of the experts and a smaller vocabulary (random
weights), and the trained sample samples/top1. Bits: 8 stores all matrices in int8 (Q8_0), 4 in int4 (Q4_0), but the head in
int8; the router is not rounded. llama.cpp has a scale for 32 weights, OpenVINO and onnxruntime-genai one for the number that
their tools choose, we one for 128. Activations are rounded to int8 where a runtime does so by default, and in ours.

    python benchmarks/runtime_comparison.py prepare --folder /scratch --python llama_cpp=/venvs/llama_cpp/bin/python ...
    python benchmarks/runtime_comparison.py measure --folder /scratch --model qwen3 --bits 4 --against llama_cpp ...

``--python NAME=PATH`` gives the interpreter that has the packages of benchmarks/runtimes/NAME.txt; default: this one. Rows go to
benchmarks/results/runtime_comparison.json and replace those of the same processor, model, bits, runtime and opponent.

``correlation`` and ``same_token`` compare the logits after a prompt with those of transformers in fp32, which shows that all
runtimes run the same model. With random weights, rounding to 4 bits changes logits far more than in a trained model.
``resident_mb`` is the memory of one sequence's longest prompt, ``peak_mb`` includes several sequences of up to 2048 tokens.
``of_bandwidth`` is the rate at which decoding one sequence reads our weights, as a fraction of the measured read bandwidth.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RUNTIMES = Path(__file__).parent / "runtimes"
sys.path.insert(0, str(ROOT / "tests" / "support"))

import numpy as np
from generated_checkpoint import OLMOE_1B_7B, QWEN3_30B_A3B, generate
from generated_checkpoint import Model as Shapes
from machine import Probe
from plans import plan_of
from provenance import processor, provenance

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.lowerings import Native
from rq_compile.planning.schema import Slot
from rq_compile.quantization.formats import DenseFormat, Format
from rq_compile.runtime.reference import Reference
from rq_compile.targets.onnxruntime import compile_engine

RESULTS = ROOT / "benchmarks" / "results" / "runtime_comparison.json"
RANDOM = {
    "qwen3": replace(QWEN3_30B_A3B, layers=3, experts=64, vocabulary=16384),
    "olmoe": replace(OLMOE_1B_7B, layers=3, experts=32, vocabulary=16384),
}
TRAINED = {"top1": ROOT / "samples" / "top1"}
FORMATS: dict[int, tuple[Format, DenseFormat]] = {8: ("int8", "int8"), 4: ("int4", "int4")}
REST = 0.3  # seconds before a turn
CHECKED = 64  # tokens of the prompt after which logits are compared
OURS = "rq-compile"


@dataclass(frozen=True)
class Runtime:
    """``module``: in ``benchmarks/runtimes``. ``file``: what it loads, in the folder of a model."""

    name: str
    module: str
    file: str

    def path(self, folder: Path, bits: int) -> Path:
        return folder / self.file.format(bits=bits)

    def prepare(self, checkpoint: Path, output: Path, bits: int, python: str) -> None:
        """Write ``output`` from ``checkpoint``.

        Raises:
            subprocess.CalledProcessError: the runtime's tool does not know the model.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RqCompile(Runtime):
    activation_bits: int = 8

    def prepare(self, checkpoint: Path, output: Path, bits: int, python: str) -> None:
        format, dense_format = FORMATS[bits]
        opened = Model.open(checkpoint)
        plan = plan_of(opened, lambda layer: [Slot(expert=expert, format=format) for expert in range(layer.geometry.experts)])
        plan = plan.model_copy(update={"quantizer": "nearest"})
        compile_engine(opened, plan, output, Native(activation_bits=self.activation_bits, dense_format=dense_format))


class LlamaCpp(Runtime):
    def prepare(self, checkpoint: Path, output: Path, bits: int, python: str) -> None:
        script = RUNTIMES.parent / "llama_cpp" / "gguf_checkpoint.py"
        run(python, script, checkpoint, "--format", {8: "Q8_0", 4: "Q4_0"}[bits], "-o", output)


class OpenVino(Runtime):
    def prepare(self, checkpoint: Path, output: Path, bits: int, python: str) -> None:
        tool = Path(python).parent / "optimum-cli"
        options = ["--task", "text-generation-with-past", "--weight-format", f"int{bits}", "--disable-convert-tokenizer"]
        blocks = ["--sym", "--group-size", 128] if bits == 4 else []
        run(tool, "export", "openvino", "-m", checkpoint, *options, *blocks, output)


class OnnxRuntimeGenai(Runtime):
    def prepare(self, checkpoint: Path, output: Path, bits: int, python: str) -> None:
        run(python, RUNTIMES / "build_onnxruntime_genai.py", checkpoint, output, "--bits", bits)


ALL: dict[str, Runtime] = {
    "rq_compile": RqCompile(OURS, "rq_compile_engine.py", "int{bits}.onnx"),
    "rq_compile_32": RqCompile(f"{OURS}, fp32 activations", "rq_compile_engine.py", "int{bits}-32.onnx", 32),
    "llama_cpp": LlamaCpp("llama.cpp", "llama_cpp_model.py", "q{bits}.gguf"),
    "openvino": OpenVino("OpenVINO", "openvino_model.py", "openvino-int{bits}"),
    "onnxruntime_genai": OnnxRuntimeGenai("onnxruntime-genai", "onnxruntime_genai_model.py", "genai-int{bits}"),
}
Row = dict[str, Any]


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


class Worker:
    """A runtime's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.load_s: float = self._answer()["load_s"]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args!r} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def started(runtime: Runtime, path: Path, python: str, threads: int, log: Path) -> Iterator[Worker]:
    with log.open("w") as errors:
        command = [python, str(RUNTIMES / runtime.module), str(path), str(threads)]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.wait()


def measured(name: str, bits: int, against: list[str], settings: argparse.Namespace) -> Iterator[Row]:
    """The rows of our engine and of ``against``, which take turns."""
    folder = settings.folder / name
    vocabulary = json.loads((checkpoint_of(name, settings.folder) / "config.json").read_text())["vocab_size"]
    random = np.random.default_rng(0)
    cases = [(tokens, batch) for tokens, batch in settings.cases]
    prompts = {case: random.integers(1, vocabulary, case[::-1]).tolist() for case in cases}
    expected = np.load(folder / "expected.npy")
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        workers: dict[str, Worker] = {}
        rows: dict[str, Row] = {}
        for key in ("rq_compile", *against):
            runtime, python, log = ALL[key], settings.python.get(key, sys.executable), folder / f"{key}.log"
            starting = started(runtime, runtime.path(folder, bits), python, settings.threads, log)
            workers[key] = stack.enter_context(starting)
            logits = Path(scratch) / f"{key}.npy"
            workers[key].ask(do="logits", prompt=checked_prompt(vocabulary), path=str(logits))
            rows[key] = {"load_s": round(workers[key].load_s, 2), **agreement(np.load(logits), expected)}
        times: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
        probe, bandwidth = Probe(), 0.0
        for number in range(settings.rounds + 1):
            time.sleep(REST)
            bandwidth = max(bandwidth, *(probe.machine(settings.threads).bandwidth for _ in range(3)))
            for tokens, batch in cases:
                for key, worker in workers.items():
                    time.sleep(REST)
                    said = worker.ask(do="round", prompts=prompts[tokens, batch], steps=settings.steps)
                    if number == 0 and batch == 1:
                        rows[key]["resident_mb"] = round(worker.ask(do="memory")["resident"] / 1e6)
                    if number > 0:
                        times.setdefault((key, tokens, batch), []).append((said["prefill_s"], said["decode_s"]))
        for key, row in rows.items():
            for tokens, batch in cases:
                prefill, decode = (median(each) for each in zip(*times[key, tokens, batch], strict=True))
                if batch == 1:
                    row[f"prefill_{tokens}"] = round(tokens / prefill, 1)
                row[f"decode_{tokens}_batch_{batch}"] = round(batch * settings.steps / decode, 1)
            if key == "rq_compile" and name in RANDOM:
                read = read_bytes(RANDOM[name], bits) * row[f"decode_{cases[0][0]}_batch_1"]
                row["of_bandwidth"] = round(read / bandwidth, 3)
            row["peak_mb"] = round(workers[key].ask(do="memory")["peak"] / 1e6)
            yield {
                "model": name,
                "bits": bits,
                "runtime": ALL[key].name,
                "against": "" if key != "rq_compile" else ", ".join(ALL[other].name for other in against),
                **row,
                "bandwidth": round(bandwidth / 1e9, 1),
                "threads": settings.threads,
                "steps": settings.steps,
                "rounds": settings.rounds,
                "processor": processor(),
                **provenance("rq-compile", "onnxruntime"),
            }


def read_bytes(shapes: Shapes, bits: int) -> float:
    """Bytes of our engine's weights that one token reads. Each block of 128 weights has a scale of four bytes."""
    count = {name: math.prod(shape) for name, shape in shapes.shapes.items() if len(shape) == 2}
    experts = sum(size for name, size in count.items() if ".experts." in name)
    attention = sum(size for name, size in count.items() if ".self_attn." in name)
    routers = sum(size for name, size in count.items() if name.endswith(".mlp.gate.weight"))
    rounded = attention + experts * shapes.top_k / shapes.experts
    return rounded * (bits + 0.25) / 8 + count["lm_head.weight"] * 8.25 / 8 + 4 * routers


def agreement(logits: np.ndarray, expected: np.ndarray) -> Row:
    return {
        "correlation": round(float(np.corrcoef(logits, expected)[0, 1]), 4),
        "same_token": bool(logits.argmax() == expected.argmax()),
    }


def checked_prompt(vocabulary: int) -> list[int]:
    prompt: list[int] = np.random.default_rng(1).integers(1, vocabulary, CHECKED).tolist()
    return prompt


def checkpoint_of(name: str, folder: Path) -> Path:
    return TRAINED.get(name, folder / name / "checkpoint")


def prepare(settings: argparse.Namespace) -> None:
    for name in settings.model:
        folder, checkpoint = settings.folder / name, checkpoint_of(name, settings.folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not checkpoint.exists():
            generate(RANDOM[name], checkpoint)
        if not (folder / "expected.npy").exists():
            opened = Model.open(checkpoint)
            prompt = np.array([checked_prompt(opened.config.vocab_size)])
            np.save(folder / "expected.npy", Reference(load_model(opened), settings.threads).logits(prompt)[0, -1])
        for key in settings.against:
            for bits in settings.bits:
                if not (output := ALL[key].path(folder, bits)).exists():
                    ALL[key].prepare(checkpoint, output, bits, settings.python.get(key, sys.executable))


def measure(settings: argparse.Namespace) -> None:
    for name in settings.model:
        for bits in settings.bits:
            for row in measured(name, bits, [key for key in settings.against if key != "rq_compile"], settings):
                print(json.dumps(row), flush=True)
                known = json.loads(settings.output.read_text()) if settings.output.exists() else []
                key = ("processor", "model", "bits", "runtime", "against")
                kept = [other for other in known if [other[part] for part in key] != [row[part] for part in key]]
                settings.output.write_text(json.dumps([*kept, row], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "measure"))
    parser.add_argument("--folder", type=Path, required=True, help="a folder for models, with 15 GB of free space")
    parser.add_argument("--model", choices=(*RANDOM, *TRAINED), nargs="+", default=[*RANDOM])
    parser.add_argument("--bits", type=int, choices=FORMATS, nargs="+", default=[*FORMATS])
    parser.add_argument(
        "--against", choices=ALL, nargs="+", default=[*ALL], help="rq_compile_32: our engine with fp32 activations"
    )
    parser.add_argument("--python", nargs="+", default=[], metavar="NAME=PATH", help="a runtime's interpreter")
    parser.add_argument("--cases", nargs="+", default=["128x1", "1024x1", "128x8"], help="prompt tokens x sequences")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are decoded after the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    settings = parser.parse_args()
    settings.python = dict(given.split("=", 1) for given in settings.python)
    settings.cases = [tuple(map(int, case.split("x"))) for case in settings.cases]
    (prepare if settings.stage == "prepare" else measure)(settings)


if __name__ == "__main__":
    main()
