"""Tiny checkpoints, built once per session, and the files of all stages for one of them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import tiny
import torch
from click.testing import Result
from command_line import SAMPLE_TEXTS, run_command
from own_engines import chat_engine, engine_of, model_with_chat, own_model  # noqa: F401 - fixtures
from plugin_builds import built_kernels, cuda_headers, cuda_ops, cuda_parts, described_kernels  # noqa: F401 - fixtures

from rq_compile.architectures.model import Model
from rq_compile.export.export import export_graph
from rq_compile.export.exported import Exported
from rq_compile.targets import onnxruntime as target

pytest_plugins = ["messages"]  # records what users are told

# On a busy machine, an example may wait for the processor without being slow itself.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# Threads only slow down models this small, and much so on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _threads_of_torch() -> Iterator[None]:
    """A test that sets the number of threads would change the last bits of later tests' calibrations."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_checkpoint(family)`` is the directory of that family's tiny checkpoint; do not write to it."""
    root = tmp_path_factory.mktemp("tiny")
    built: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in built:
            built[family] = tiny.build(family, root / family)
        return built[family]

    return build


@pytest.fixture(scope="session")
def rq_compile() -> Callable[..., Result]:
    return run_command


@pytest.fixture(scope="session")
def export_once() -> Iterator[Callable[[Model], Exported]]:
    """While this is in use, a checkpoint is exported only once, which takes seconds, even if it is compiled several times."""
    known: dict[Path, Exported] = {}

    def export(checkpoint: Model) -> Exported:
        if checkpoint.path not in known:
            known[checkpoint.path] = export_graph(checkpoint)
        return known[checkpoint.path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "export_graph", export)
        yield export


@pytest.fixture(scope="session")
def stages(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    export_once: Callable[[Model], Exported],
) -> Path:
    """The files that the commands write for the tiny OLMoE: text.txt, calibration.json, plan.json (replicas, formats) and
    model.onnx with its files; do not write to it."""
    folder, model = tmp_path_factory.mktemp("stages"), tiny_checkpoint("olmoe")
    (folder / "text.txt").write_text((SAMPLE_TEXTS / "hacker.heldout.txt").read_text()[:3000])
    calibration, plan = folder / "calibration.json", folder / "plan.json"
    for arguments in (
        ("calibrate", model, "--text", folder / "text.txt", "--sequence-length", 64, "-o", calibration),
        ("plan", calibration, "--target", "batched", "--memory", 0.6, "-o", plan),
        (model, "--plan", plan, "-o", folder / "model.onnx"),
    ):
        result = run_command(*arguments, "-q")
        assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    """The tiny OLMoE's directory; do not write to it."""
    return tiny_checkpoint("olmoe")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for outputs."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder
