"""``rq-compile package``: write a folder with everything that is needed to deploy an engine."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rq_compile.cli.options import FILE, given_options
from rq_compile.cli.screen import Screen, on_screen
from rq_compile.errors import UserError
from rq_compile.packaging.op_library import MACHINES

if TYPE_CHECKING:
    from rq_compile.packaging.package import Destination

# The module of ``rq_compile.packaging`` that makes each destination's package.
MODULES: dict[Destination, str] = {
    "triton": "triton",
    "edge": "edge",
    "onnxruntime-genai": "onnxruntime_genai",
    "tensorrt-llm": "tensorrt_llm",
    "sglang": "sglang",
    "vllm": "vllm",
    "vllm-ascend": "vllm_ascend",
    "ktransformers": "ktransformers",
    "hybrid-bit-map": "hybrid_bit_map",
    "mone": "mone",
}
# The destinations that an option is for.
OPTIONS: dict[str, tuple[Destination, ...]] = {
    **dict.fromkeys(("flavour", "name", "mount", "instances", "threads", "calibration", "engine_for"), ("triton",)),
    **dict.fromkeys(("library", "architecture"), ("edge",)),
    "layers": ("sglang", "ktransformers"),
    "extra_layers": ("tensorrt-llm", "sglang", "vllm", "vllm-ascend"),
    "context_length": ("onnxruntime-genai",),
}


@click.command("package")
@click.argument("engine", type=FILE)
@click.option(
    "--for",
    "destination",
    type=click.Choice(list(MODULES)),
    required=True,
    help="The server, device or library that will run it.",
)
@click.option("-o", "--output", type=FILE, required=True, help="The folder to write; edge: also an archive (.tar.gz, .zip).")
@click.option(
    "--flavour",
    type=click.Choice(["python", "onnxruntime", "tensorrt"]),
    help="triton: the backend; default: python, with text as input and output, or tensorrt for an engine that ends in .plan.",
)
@click.option("--name", help="triton: the model's name; default: the engine's.")
@click.option("--mount", help="triton, onnxruntime: where the server will see the repository; default: /models.")
@click.option("--instances", type=click.IntRange(1), help="triton, onnxruntime: number of parallel sessions; default: 1.")
@click.option("--threads", type=click.IntRange(1), help="triton: threads of an instance; default: ONNX Runtime's choice.")
@click.option(
    "--calibration", type=FILE, help="triton, onnxruntime: the engine's calibration, for its batch and sequence lengths."
)
@click.option(
    "--engine-for",
    multiple=True,
    metavar="8.9=FILE",
    help="triton, tensorrt: the engine for a compute capability; repeat it for each engine, including ENGINE.",
)
@click.option("--library", type=FILE, help="edge: an op library for another machine; default: that of this machine.")
@click.option(
    "--architecture",
    type=click.Choice(list(MACHINES.values())),
    help="edge: the architecture that the op library must be built for.",
)
@click.option("--layers", type=click.IntRange(1), help="sglang, ktransformers: number of decoder layers, including dense ones.")
@click.option(
    "--extra-layers",
    type=click.IntRange(1),
    help="tensorrt-llm, sglang, vllm, vllm-ascend: number of multi-token-prediction layers to add rows for.",
)
@click.option(
    "--context-length", type=click.IntRange(1), help="onnxruntime-genai: maximum tokens of a sequence; default: the model's."
)
@on_screen
def command(screen: Screen, engine: Path, destination: Destination, output: Path, **options: Any) -> None:
    """Write a folder from which a server or device can run ENGINE.

    For the cluster servers (tensorrt-llm, sglang, vllm, vllm-ascend), ktransformers, hybrid-bit-map and mone, ENGINE may be a
    plan.json: they load the checkpoint themselves, and only read what the plan says of its experts.
    """
    given = {name: option for name, option in given_options().items() if name in OPTIONS}
    for name, option in given.items():
        if destination not in OPTIONS[name]:
            raise UserError(f"{option} has no effect with --for {destination}; leave one of the two out", 2)

    from rq_compile.cli.tables import package_tables

    package = importlib.import_module(f"rq_compile.packaging.{MODULES[destination]}").package
    result = package(engine, output, **{name: options[name] for name in given})
    screen.note(f"wrote {output}")
    screen.result(result, *package_tables(result))
