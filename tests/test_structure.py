"""The structure: which package may import which, and tables that the documentation and the code share."""

import ast
import importlib
import re
from pathlib import Path
from typing import get_args

import pytest

from rq_compile.engine.library import FORMAT_GROUPS
from rq_compile.engine.manifest import LoweringName
from rq_compile.lowerings import LOWERINGS, TENSORRT_LOWERINGS, Lowering, lowering_for, lowering_of
from rq_compile.planning.targets import TARGETS, Target
from rq_compile.quantization.formats import SLOT_FORMATS, tensors_of
from rq_compile.targets.tensorrt.compile import TARGETS as OF_BUILDER

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rq_compile"
# From the bottom. A package imports only from lower floors, and never from another package on its own floor.
FLOORS = (
    ("bounds", "errors", "standalone"),
    ("processes",),
    ("file_systems", "quantization", "spill", "violations"),
    ("checkpoint", "files"),
    ("estimates", "outputs", "texts", "versions"),
    ("architectures",),
    ("calibration",),
    ("planning",),
    ("engine",),
    ("rewrite",),
    ("export", "lowerings"),
    ("runtime", "targets"),
    ("evaluation", "inspection"),
    ("packaging", "reporting", "serving"),
    ("api", "schemas"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports(path: Path) -> set[str]:
    """The packages and modules directly under ``rq_compile`` that the file imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rq_compile":
            rest = node.module.split(".")[1:2]
            found |= set(rest or (name.name for name in node.names if name.name != "__version__"))
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("rq_compile.")}
    return found


def test_imports_go_down() -> None:
    upward = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        upward += [
            f"{path.relative_to(ROOT)} imports {other}" for other in imports(path) - {own} if FLOOR_OF[other] >= FLOOR_OF[own]
        ]
    assert upward == []


def test_every_package_has_a_floor() -> None:
    there = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert there == FLOOR_OF.keys()


@pytest.mark.parametrize("package", ["planning", "quantization", "checkpoint", "engine"])
def test_no_onnx_below_the_rewriting(package: str) -> None:
    for path in (PACKAGE / package).rglob("*.py"):
        assert not re.search(r"^\s*(import|from) onnx", path.read_text(), re.MULTILINE), path


def test_all_libraries_know_the_same_format_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same order, with the names of their tensors, their bits and the kind of their scales."""
    written = (ROOT / "plugins" / "format_groups.h").read_text()
    of_libraries = re.findall(
        r'^    \{"(\w+)", "(\w+)", (nullptr|"\w+"), (\d+), (true|false), (true|false)\},$', written, re.MULTILINE
    )
    monkeypatch.syspath_prepend(ROOT / "plugins" / "kernels")
    of_kernels = importlib.import_module("rq_kernels.formats")
    of_gpu = [*of_kernels.GROUPS, *[None] * (len(FORMAT_GROUPS) - len(of_kernels.GROUPS))]
    assert f"kGpuGroups = {len(of_kernels.GROUPS)};" in written
    for (name, weights, scales, bits, exponents, mixes), group, kernels in zip(of_libraries, FORMAT_GROUPS, of_gpu, strict=True):
        tensors = tuple(tensor.strip('"') for tensor in (weights, scales) if tensor != "nullptr")
        kept = [format for format in SLOT_FORMATS.values() if format.group == group]
        assert (name, tensors) == (group, tensors_of(group))
        assert (exponents == "true") == any(getattr(format, "exponents", False) for format in kept)
        assert (mixes == "true") == (kernels is not None and bool(of_kernels.FEW_BITS >> FORMAT_GROUPS.index(group) & 1))
        if kernels is not None:
            assert (name, tensors, int(bits), exponents == "true") == (
                *(kernels.name, kernels.tensors, kernels.bits, kernels.exponents),
            )
        assert all(int(bits) == (format.bits if format.quantized else 0) for format in kept)


def test_nothing_tells_lowerings_apart_by_name() -> None:
    compared = re.compile(r"lowering(\.name)? (==|!=|in|not in) [(\"\[]")
    found = [str(path) for path in PACKAGE.rglob("*.py") if compared.search(path.read_text()) and path.name != "decoding.py"]
    assert found == []


@pytest.mark.parametrize("kind", [*LOWERINGS.values(), *TENSORRT_LOWERINGS.values()])
def test_a_lowering_says_all_that_is_asked(kind: type[Lowering]) -> None:
    made = kind()
    assert made.summary
    assert made.planned_for in TARGETS
    assert set(made.default_for) <= TARGETS.keys()
    for option in made.options:
        getattr(made, option)
    assert made.activation_bits in (16, 32)


@pytest.mark.parametrize("kind", [*LOWERINGS.values(), *TENSORRT_LOWERINGS.values()])
def test_every_lowering_takes_these_formats(kind: type[Lowering]) -> None:
    """Tests of a lowering leave out the formats that it does not take."""
    assert {"fp32", "fp16", "bf16", "int8", "int4"} <= set(kind.formats)


def test_lowerings_by_name_and_by_target() -> None:
    assert tuple(LOWERINGS) == get_args(LoweringName)
    assert [lowering_for(target).name for target in TARGETS] == ["native", "cuda", "native", "native", "native"]
    assert [lowering_for(target, 2).name for target in TARGETS] == ["ranks", "cuda", "native", "native", "native"]
    with pytest.raises(KeyError):
        lowering_of("onnx")


def test_the_documentation_has_the_table_of_targets() -> None:
    """The target, the part that builds an engine for it, and the lowering."""
    assert tuple(TARGETS) == get_args(Target)
    served: dict[str, list[str]] = {target: [] for target in TARGETS}
    for kind in LOWERINGS.values():
        served[kind.planned_for].append(f"`{kind.name}`")
    for builder, kind in zip(OF_BUILDER, (TENSORRT_LOWERINGS["plugins"], TENSORRT_LOWERINGS["batched"]), strict=True):
        assert OF_BUILDER[builder] == kind.planned_for
        served[kind.planned_for].append(f"`{kind.name}`")
    waits = {target: "its busiest slot" if costs.batched else "no slot" for target, costs in TARGETS.items()}
    page = (ROOT / "docs" / "supported.md").read_text()
    for target in TARGETS:
        builders: dict[str, str] = {name: f"TensorRT (`--builder {of}`)" for of, name in OF_BUILDER.items()}
        assert f"| `{target}` | {builders.get(target, 'ONNX Runtime')} | {', '.join(served[target])} | {waits[target]} |" in page
    for name in LOWERINGS:
        assert f"\n| `{name}`" in page


def test_python_processes_of_tests_do_not_import_from_the_working_folder() -> None:
    """In a fresh clone that is a source tree without libraries; ``-P`` leaves it out. ``command_line.python`` does so, too."""
    started = re.compile(r"sys\.executable, (?=[\"']-[cm])")
    assert [path.name for path in (ROOT / "tests").rglob("*.py") if started.search(path.read_text())] == []
