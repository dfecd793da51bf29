"""A command line of TensorRT's ``trtexec`` that builds an engine as ``build_engine`` does."""

import shlex
from collections.abc import Mapping, Sequence

from rq_compile.targets.tensorrt.profiles import Shapes


def trtexec(network: str, engine: str, timing_cache: str, profiles: Sequence[Shapes], plugins: str | None = None) -> str:
    """A shell script with one command; paths are relative to its folder. ``plugins``: the library that the engine needs."""
    arguments = [
        f"--onnx={network}",
        f"--saveEngine={engine}",
        "--stronglyTyped",
        "--noTF32",
        f"--timingCacheFile={timing_cache}",
    ]
    if plugins is not None:
        # A name without a slash would be searched for in the system's library folders.
        arguments += [f"--dynamicPlugins=./{plugins}", f"--setPluginsToSerialize=./{plugins}"]
    for number, shapes in enumerate(profiles):
        arguments.append(f"--profile={number}")
        for place, end in enumerate(("min", "opt", "max")):
            arguments.append(f"--{end}Shapes={_shapes({name: ends[place] for name, ends in shapes.items()})}")
    lines = " \\\n  ".join(shlex.quote(argument) for argument in (*arguments, "--skipInference"))
    return f'#!/bin/sh\ncd "$(dirname "$0")" && exec trtexec \\\n  {lines}\n'


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
