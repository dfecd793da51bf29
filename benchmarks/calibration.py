"""What does a calibration cost beyond the model's own forward pass? Layers in the shape of published models, random weights.

    python benchmarks/calibration.py --shape OLMoE-1B-7B --tokens 4096 --way layers --folder /scratch

"forward" is transformers' forward pass, in fp32 with `grouped_mm`, over the batches that the calibration runs, with the head,
which the calibration measures, too; "forward_body" is the part of it before the head. It runs in a process of its own, because
the program's settings of the memory allocator are not transformers'. "read" reads every tensor of the checkpoint
once, as stored. "calibrate" is all of `rq_compile.calibration.calibrate`, with GPTQ, either with the whole model in memory
("whole") or layer by layer ("layers"). "expert" is the CPU seconds of the measurements for an expert of 6.3 million weights,
including GPTQ for int8 and int4, without the products of the expert's tokens with its original weights, which every forward pass
computes. "ratio" is the seconds of the calibration divided by those of its goal, three forward passes and one read. A model has
``--layers`` layers and a vocabulary of 4,096 tokens for each. The published models have 3,144 to 3,793 for each of their layers,
so embedding and head have a little more than their share. Forward passes and calibrations take turns for `--rounds` rounds,
because the speed of a shared machine drifts; figures are means over the rounds. The profile lists the functions that took most of
the main thread's time, in a separate run.

A row is written to benchmarks/results/calibration.json (``--output``), and replaces a row of the same shape, layers, tokens, way,
experts and instructions.
"""

import argparse
import cProfile
import json
import platform
import pstats
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time, thread_time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, OlmoeConfig, PretrainedConfig, Qwen3MoeConfig

ROOT = Path(__file__).parents[1]

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.calibration import calibrate as calibration
from rq_compile.calibration import measure
from rq_compile.calibration.memory import Way
from rq_compile.calibration.recording import model_arguments
from rq_compile.calibration.scratch import return_large_arrays_when_freed
from rq_compile.calibration.text import tokenize
from rq_compile.quantization.formats import Quantizer

RESULTS = ROOT / "benchmarks" / "results" / "calibration.json"
TOKENIZER = ROOT / "samples" / "olmoe" / "tokenizer.json"
WEIGHTS = 6.3e6  # of an expert of OLMoE-1B-7B
CUT: dict[str, Any] = {"batch_size": 2, "sequence_length": 1024}
VOCABULARY = 4096  # for each layer
COMMON: dict[str, Any] = {
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
SHAPES: dict[str, PretrainedConfig] = {
    "OLMoE-1B-7B": OlmoeConfig(
        **COMMON, hidden_size=2048, intermediate_size=1024, num_attention_heads=16, num_experts=64, num_experts_per_tok=8
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        **(COMMON | {"head_dim": 128}),
        hidden_size=2048,
        intermediate_size=2048,  # of no layer
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        decoder_sparse_step=1,
    ),
    "DeepSeek-V2-Lite": DeepseekV2Config(
        **COMMON,
        hidden_size=2048,
        intermediate_size=2048,
        moe_intermediate_size=1408,
        num_attention_heads=16,
        q_lora_rank=None,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=0,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
}


class Clock:
    """CPU seconds of all threads, and elapsed seconds, inside of the ``with`` blocks; several blocks add up."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def __enter__(self) -> "Clock":
        self._began = process_time(), perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu += process_time() - self._began[0]
        self.wall += perf_counter() - self._began[1]

    def add(self, other: "Clock") -> None:
        self.cpu += other.cpu
        self.wall += other.wall

    def row(self, name: str, rounds: int) -> dict[str, float]:
        return {f"{name}_cpu_s": round(self.cpu / rounds, 3), f"{name}_s": round(self.wall / rounds, 3)}


def checkpoint(shape: str, experts: int | None, folder: Path, layers: int = 1) -> Path:
    """The checkpoint, which is made if it does not exist. With fewer ``experts``, a token chooses proportionally fewer."""
    path = folder / (f"{shape}-{experts or 'all'}" + (f"-{layers}-layers" if layers > 1 else ""))
    if not path.exists():
        config = SHAPES[shape]
        config.num_hidden_layers, config.vocab_size = layers, VOCABULARY * layers
        if experts:
            name = "n_routed_experts" if hasattr(config, "n_routed_experts") else "num_experts"
            config.num_experts_per_tok = max(1, config.num_experts_per_tok * experts // getattr(config, name))
            setattr(config, name, experts)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
        (path / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    return path


def text(model: Model, tokens: int) -> dict[str, str]:
    """The sample texts, cut to about ``tokens`` tokens."""
    whole = "\n".join(file.read_text() for file in sorted((ROOT / "samples" / "text").glob("*.txt")))
    count = len(tokenize(model, {"all": whole}).of[0])
    return {"text": whole[: int(len(whole) * tokens / count)]}


def timed_in(module: Any, name: str, clock: Clock) -> Callable[[], None]:
    """Have ``clock`` run while the module's function runs. Returns a function that undoes this."""
    function = getattr(module, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        with clock:
            return function(*arguments, **options)

    setattr(module, name, timed)
    return lambda: setattr(module, name, function)


@cache
def loaded(path: Path) -> Any:
    return load_model(Model.open(path))


def forward_pass(path: Path, tokens: int, last_batch: bool = False) -> tuple[Clock, Clock]:
    """The time of the model over the text, or over its last batch, and that of its body alone."""
    model = Model.open(path)
    batches = calibration.work_of(model, text(model, tokens), **CUT).batches
    net, forward, body = loaded(path), Clock(), Clock()
    with forward, torch.inference_mode():
        for batch in batches[-1:] if last_batch else batches:
            with body:
                hidden = net.base_model(**model_arguments(batch, "cpu"))[0]
            net.lm_head(hidden)
    return forward, body


def row(path: Path, shape: str, tokens: int, way: str, quantizer: Quantizer, rounds: int, with_profile: bool) -> dict[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as transformers:
        transformers.submit(forward_pass, path, tokens, last_batch=True).result()
        # As the program does, once the other process has begun with settings of its own, and before torch first allocates.
        return_large_arrays_when_freed()
        return measured(transformers, path, shape, tokens, way, quantizer, rounds, with_profile)


def measured(
    transformers: ProcessPoolExecutor,
    path: Path,
    shape: str,
    tokens: int,
    way: str,
    quantizer: Quantizer,
    rounds: int,
    with_profile: bool,
) -> dict[str, Any]:
    model = Model.open(path)
    texts = text(model, tokens)
    geometry = model.layers[0].geometry
    calibration.choose_way = lambda *_, **__: Way(way == "whole", True, way)
    work = calibration.work_of(model, texts, **CUT)

    read, forward, body, calibrate, measuring = (Clock() for _ in range(5))
    own_cpu: list[float] = []
    undo = timed_in(calibration, "measure_layer", measuring)
    products = measure.expert_outputs

    def expert_outputs(x: torch.Tensor, weights: Any, geometry: Any, sums: np.ndarray | None = None) -> torch.Tensor:
        if sums is None:
            return products(x, weights, geometry)
        began = thread_time()
        found = products(x, weights, geometry, sums)
        own_cpu.append(thread_time() - began)
        return found

    measure.expert_outputs = expert_outputs  # type: ignore[assignment]  # one function for two overloads
    run = partial(calibration.calibrate, model, texts, **CUT, quantizer=quantizer, progress=lambda *_: None)
    for _ in range(rounds):
        for clock, more in zip((forward, body), transformers.submit(forward_pass, path, tokens).result(), strict=True):
            clock.add(more)
        with read:
            for name in model.checkpoint.names:
                model.checkpoint.read(name)
        with calibrate:
            run()
    undo()
    measure.expert_outputs = products

    weights = geometry.hidden * (geometry.up_rows + geometry.intermediate)
    scale = WEIGHTS / weights / geometry.experts / len(model.layers)
    return {
        "shape": shape,
        "layers": len(model.layers),
        "experts": geometry.experts,
        "way": way,
        "quantizer": quantizer,
        "tokens": work.total,
        "rounds": rounds,
        **forward.row("forward", rounds),
        "forward_body_s": body.row("body", rounds)["body_s"],
        **read.row("read", rounds),
        **calibrate.row("calibrate", rounds),
        "expert_cpu_s": round((measuring.cpu - sum(own_cpu)) * scale / rounds, 3),
        "ratio": round(calibrate.wall / (3 * forward.wall + read.wall), 3),
        **environment(),
        **({"profile": profile(run)} if with_profile else {}),
    }


def profile(run: Callable[[], object]) -> dict[str, float]:
    """Seconds by function, of those that took most."""
    side_by_side, profiler = measure.side_by_side, cProfile.Profile()
    measure.side_by_side = lambda jobs: (job() for job in jobs)
    profiler.runcall(run)
    measure.side_by_side = side_by_side
    rows = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    most = sorted(rows, key=lambda item: -item[1][2])[:12]
    return {
        f"{Path(file).stem}:{function}" if line else function.strip("<>"): round(found[2], 2)
        for (file, line, function), found in most
    }


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = [line.partition(":")[::2] for line in Path("/proc/cpuinfo").read_text().splitlines()]
    cpus = [value.strip() for name, value in about if name.strip() == "model name"]
    flags = {flag for name, value in about if name.strip() == "flags" for flag in value.split()}
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "commit": commit,
        "threads": torch.get_num_threads(),
        "processor": cpus[0] if cpus else platform.machine(),
        # Processors of one name may differ in these.
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if flag in flags],
        "versions": {"python": platform.python_version(), **versions},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="OLMoE-1B-7B")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--way", choices=("whole", "layers"), default="layers")
    parser.add_argument("--quantizer", choices=("gptq", "nearest"), default="gptq")
    parser.add_argument("--experts", type=int, help="number of experts, if fewer than the model has")
    parser.add_argument("--layers", type=int, default=1, help="number of layers")
    parser.add_argument("--folder", type=Path, required=True, help="folder where checkpoints are made and kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="calibrate once more with a profiler")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="file to which the row is written")
    parser.add_argument("--only-make", action="store_true", help="make the checkpoint and measure nothing")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint(arguments.shape, arguments.experts, arguments.folder, arguments.layers)
    if arguments.only_make:
        return
    found = row(
        *(path, arguments.shape, arguments.tokens, arguments.way, arguments.quantizer, arguments.rounds, arguments.profile)
    )
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    key = ("shape", "layers", "experts", "way", "quantizer", "tokens", "instructions")
    # Rows of earlier versions are of one layer.
    kept = [other for other in known if [({"layers": 1} | other).get(name) for name in key] != [found[name] for name in key]]
    arguments.output.write_text(json.dumps([*kept, found], indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
