"""Build a TensorRT or TensorRT-RTX engine. Needs only Python and one of the two packages; rq-compile need not be installed.

rq-compile runs this file in a separate process. It also writes a copy beside a network, for the machine that has the GPU:

    python engine.build.py engine.build.json

The settings (JSON) give the network (ONNX, with its weights beside it), the engine to write, the builder ("tensorrt" or "rtx"),
the library of the network's plugins if it has any, the compute capabilities, and, for each profile, the smallest, best and
largest shape of every input. ``<engine>.report.json``, beside the engine, describes what was built. Both packages have the same
API; ``BUILDERS`` lists the differences between them.
"""

import argparse
import importlib
import json
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Builder:
    """``ahead``: it builds without a GPU, for the compute capabilities requested, and without plugins. Otherwise it builds for
    the GPU of this machine, and times kernels on it."""

    module: str
    install: str
    oldest: tuple[int, int]
    ahead: bool


BUILDERS = {
    "tensorrt": Builder("tensorrt", "pip install 'tensorrt>=10.13'", (10, 13), ahead=False),
    "rtx": Builder("tensorrt_rtx", "pip install 'tensorrt-rtx>=1.7'", (1, 7), ahead=True),
}


class BuildError(Exception):
    """Its text is a sentence for the user."""


def load(name: str) -> Any:
    """The Python module of builder ``name``.

    Raises:
        BuildError: it is not installed, does not load, or is too old.
    """
    builder = BUILDERS[name]
    try:
        module = importlib.import_module(builder.module)
    except ModuleNotFoundError as error:
        others = [f"--builder {other}" for other in BUILDERS if other != name]
        raise BuildError(
            f"the package {builder.module} is not installed; run {builder.install}, or choose {' or '.join(others)}"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise BuildError(f"the package {builder.module} does not load: {error}") from error
    version = tuple(int(number) for number in module.__version__.split(".")[:2])
    if version < builder.oldest:
        needed = ".".join(map(str, builder.oldest))
        raise BuildError(f"{builder.module} {module.__version__} is older than {needed}; run {builder.install}")
    return module


def capabilities(module: Any) -> list[int]:
    """The compute capabilities that a builder builds for, 89 meaning 8.9; empty if it only builds for this machine's GPU."""
    names = [name for name in dir(getattr(module, "ComputeCapability", None)) if re.fullmatch(r"SM\d+", name)]
    return sorted(int(name.removeprefix("SM")) for name in names)


def build(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Build the engine that ``settings`` describe; paths are relative to ``folder``. Returns the report.

    Raises:
        BuildError: the builder is not installed, or rejects the network, its plugins, a profile or a compute capability.
    """
    name = settings["builder"]
    trt = load(name)
    logger = _logger(trt)
    started = time.monotonic()
    builder = trt.Builder(logger)
    plugins = _load_plugins(trt, name, builder, logger, folder, settings.get("plugins"))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / settings["network"])):
        error = parser.get_error(0)
        where = f"{error.node_operator()} {error.node_name()}"
        raise BuildError(f"{trt.__name__} {trt.__version__} cannot read {settings['network']}, at {where}: {error.desc()}")
    parsed = time.monotonic()
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # TF32 rounds to 10 bits, and the router would then choose different experts.
    config.clear_flag(trt.BuilderFlag.TF32)
    if plugins:
        config.plugins_to_serialize = plugins
    for shapes in settings["profiles"]:
        config.add_optimization_profile(_profile(builder, network, shapes))
    _set_capabilities(trt, name, config, settings["compute_capabilities"])
    cache = folder / settings["timing_cache"] if settings.get("timing_cache") and not BUILDERS[name].ahead else None
    if cache is not None:
        config.set_timing_cache(config.create_timing_cache(cache.read_bytes() if cache.is_file() else b""), False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{trt.__name__} {trt.__version__} cannot build {settings['network']}: {logger.reason()}")
    if cache is not None:
        cache.write_bytes(config.get_timing_cache().serialize())
    (folder / settings["engine"]).write_bytes(plan)
    return {
        "builder": f"{trt.__name__} {trt.__version__}",
        "compute_capabilities": settings["compute_capabilities"],
        "bytes": plan.nbytes,
        "parse_seconds": round(parsed - started, 2),
        "build_seconds": round(time.monotonic() - parsed, 2),
        "network_layers": dict(sorted(Counter(_kind(network, i) for i in range(network.num_layers)).items())),
        **logger.engine(),
    }


def _load_plugins(trt: Any, name: str, builder: Any, logger: Any, folder: Path, library: str | None) -> list[str]:
    """Load the plugin library, so that the parser knows its plugins, and have the engine include it."""
    if library is None:
        return []
    if BUILDERS[name].ahead:
        raise BuildError(f"the network has plugins, which {trt.__name__} does not support; compile it with --stock")
    # A name without a folder would be searched for in the system's library folders.
    path = str((folder / library).resolve())
    if builder.get_plugin_registry().load_library(path) is None:
        raise BuildError(f"{trt.__name__} {trt.__version__} cannot load the plugins of {library}: {logger.reason()}")
    return [path]


def _profile(builder: Any, network: Any, shapes: dict[str, Any]) -> Any:
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        name = network.get_input(number).name
        profile.set_shape(name, *shapes[name])
    if not profile:
        raise BuildError(f"the profile {json.dumps(shapes)} is out of order; correct it")
    return profile


def _set_capabilities(trt: Any, name: str, config: Any, wanted: list[int]) -> None:
    if not wanted:
        if BUILDERS[name].ahead:
            raise BuildError(f"--builder {name} needs compute capabilities; give --sm, of {_listed(capabilities(trt))}")
        return
    if not BUILDERS[name].ahead:
        raise BuildError(f"--builder {name} builds for the GPU of this machine; leave --sm out, or choose --builder rtx")
    missing = [number for number in wanted if number not in capabilities(trt)]
    if missing:
        raise BuildError(f"{trt.__name__} does not build for --sm {missing[0]}; choose from {_listed(capabilities(trt))}")
    config.num_compute_capabilities = len(wanted)
    for place, number in enumerate(wanted):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), place)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _kind(network: Any, number: int) -> str:
    return network.get_layer(number).type.name


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps errors, and what the builder says about the engine it made: the engine itself can only be queried on a GPU."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.told: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif message.startswith(("Max Scratch", "Total Weights", "Layers:")):
                self.told.append(message)

        def reason(self) -> str:
            return self.errors[0].splitlines()[0] if self.errors else "it gave no reason"

        def engine(self) -> dict[str, Any]:
            said = "\n".join(self.told)
            return {
                "engine_layers": dict(sorted(Counter(re.findall(r"LayerType: (\w+)", said)).items())),
                "scratch_bytes": [int(number) for number in re.findall(r"Max Scratch Memory: (\d+)", said)],
                "weight_bytes": sum(int(number) for number in re.findall(r"Total Weights Memory: (\d+)", said)),
            }

    return Logger()


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a TensorRT engine.")
    parser.add_argument("settings", type=Path, help="the .build.json file that rq-compile wrote")
    parser.add_argument("--builder", choices=BUILDERS, help="builder to use instead of the one in the settings")
    parser.add_argument("--sm", help="compute capabilities for --builder rtx, for example 80,89,120")
    arguments = parser.parse_args()
    settings = json.loads(arguments.settings.read_text(encoding="utf-8"))
    if arguments.builder and arguments.builder != settings["builder"]:
        settings |= {"builder": arguments.builder, "compute_capabilities": []}
    if arguments.sm:
        settings["compute_capabilities"] = [int(number) for number in arguments.sm.split(",")]
    folder = arguments.settings.parent
    try:
        report = build(settings, folder)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    (folder / f"{settings['engine']}.report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {settings['engine']}, {report['bytes']} bytes, in {report['build_seconds']} s with {report['builder']}")


if __name__ == "__main__":
    main()
