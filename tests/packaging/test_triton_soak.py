"""A short run of benchmarks/soak.py: clients of all habits, an unloaded model, a killed server."""

import sys
from collections.abc import Callable
from pathlib import Path

from triton_server import Command, compile_native, needs_server, succeed

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import soak

pytestmark = needs_server


def test_no_client_disturbs_another(
    rq_compile: Command, stages: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    engines = {"model": stages / "model.onnx", "native": compile_native(rq_compile, stages, tiny_checkpoint("olmoe"), tmp_path)}
    for name, engine in engines.items():
        succeed(rq_compile("package", engine, "--for", "triton", "--threads", 1, "-o", tmp_path / f"{name}.triton", "-q"))
    row = soak.soak([tmp_path / f"{name}.triton" for name in engines], 8, [8, 16], tmp_path)
    assert row["first_faults"] == []
    assert row["requests"].keys() == {"whole", "streamed", "over_grpc", "leaves", "cancels", "asks_nonsense"}
    assert row["unloaded_after_s"] < soak.UNLOADED_WITHIN
