"""The folder for a device: whole, the same every time, and run by ONNX Runtime alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from command_line import names, refused
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from rq_compile.files import sha256
from rq_compile.runtime.engine import Engine

Command = Callable[..., Result]
PROMPT = [5, 9, 17, 3]
# Where an unpacked ONNX Runtime release (include/, lib/) is, for the C++ example; unlike the headers, a wheel has the library.
ONNXRUNTIME = os.environ.get("ONNXRUNTIME")


@pytest.fixture(scope="module", params=["batched", "native"])
def engine(
    request: pytest.FixtureRequest, rq_compile: Command, stages: Path, tiny_checkpoint: Callable, tmp_path_factory
) -> Path:
    """One engine that needs no op library, one that does."""
    if request.param == "batched":
        return stages / "model.onnx"
    folder = tmp_path_factory.mktemp("native")
    plan, path = folder / "plan.json", folder / "small.onnx"
    for arguments in (
        ("plan", stages / "calibration.json", "--target", "cpu", "--memory", 0.6, "-o", plan),
        (tiny_checkpoint("olmoe"), "--plan", plan, "-o", path),
    ):
        result = rq_compile(*arguments, "-q")
        assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture
def packaged(rq_compile: Command, engine: Path, tmp_path: Path) -> Iterator[Path]:
    """A package in a folder that nobody may write to, without the engine it came from beside it. (The superuser may: so the
    contents are compared.)"""
    folder = tmp_path / "edge"
    result = rq_compile("package", engine, "--for", "edge", "-o", folder, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["files"] == names(folder)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def run(*command: object, cwd: Path) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_python_example_generates_the_engines_tokens_without_rq_compile(engine: Path, packaged: Path, tmp_path: Path) -> None:
    before = contents(packaged)
    blocked = (
        "import runpy, sys; sys.modules['rq_compile'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); assert not {'torch', 'onnx', 'tokenizers'} & set(sys.modules)"
    )
    said = run(sys.executable, "-c", blocked, packaged / "generate.py", "--ids", *PROMPT, "--tokens", 6, cwd=tmp_path)
    assert [int(token) for token in said] == list(Engine.load(engine, threads=1).generate(PROMPT, 6))
    assert contents(packaged) == before


def test_python_example_continues_a_text(engine: Path, packaged: Path, tmp_path: Path) -> None:
    loaded = Engine.load(engine, threads=1)
    expected = loaded.tokenizer.decode(list(loaded.generate(loaded.tokenizer.encode("The hacker").ids, 5)))
    said = run(sys.executable, packaged / "generate.py", "The", "hacker", "--tokens", 5, cwd=tmp_path)
    assert "\n".join(said) == expected.rstrip("\n")


@pytest.mark.skipif(ONNXRUNTIME is None, reason="ONNXRUNTIME names no ONNX Runtime release with its headers")
def test_cpp_example_generates_the_engines_tokens(engine: Path, packaged: Path, tmp_path: Path) -> None:
    release = Path(ONNXRUNTIME or "")
    program, libraries = tmp_path / "generate", release / "lib"
    links = ["-L", libraries, "-lonnxruntime", f"-Wl,-rpath,{libraries}"]
    run("g++", "-std=c++17", "-Wall", packaged / "generate.cc", "-I", release / "include", *links, "-o", program, cwd=tmp_path)
    said = run(program, packaged, 6, *PROMPT, cwd=tmp_path)
    assert [int(token) for token in said] == list(Engine.load(engine, threads=1).generate(PROMPT, 6))


def test_two_runs_give_the_same_bytes(rq_compile: Command, engine: Path, packaged: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere"
    assert rq_compile("package", engine, "--for", "edge", "-o", again, "-q").exit_code == 0
    assert contents(again) == contents(packaged)


def test_checksums_and_sizes_are_of_every_file(packaged: Path) -> None:
    checked = run("sha256sum", "--strict", "-c", "SHA256SUMS", cwd=packaged)
    assert checked == [f"{name}: OK" for name in names(packaged) if name != "SHA256SUMS"]
    sizes = dict(re.findall(r"^\| (\S+) \| ([\d,]+) \|$", (packaged / "README.md").read_text(), re.MULTILINE))
    written = {path.name: f"{path.stat().st_size:,}" for path in packaged.iterdir()}
    assert sizes == {name: size for name, size in written.items() if name not in ("README.md", "SHA256SUMS", "sbom.cdx.json")}


def test_bill_of_materials_follows_the_format_and_names_every_file(packaged: Path) -> None:
    content = (packaged / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(content) is None
    components = {component["name"]: component for component in json.loads(content)["components"]}
    runtime = components.pop("onnxruntime")
    assert runtime["purl"] == "pkg:pypi/onnxruntime"
    assert set(components) == set(names(packaged)) - {"SHA256SUMS", "sbom.cdx.json"}
    for name, component in components.items():
        assert component["hashes"] == [{"alg": "SHA-256", "content": sha256(packaged / name)}]
        assert component["properties"] == [{"name": "bytes", "value": str((packaged / name).stat().st_size)}]
        ours = name in ("LICENSE", "README.md", "generate.py", "generate.cc", "librq_moe.so")
        assert component.get("licenses") == ([{"expression": "Apache-2.0"}] if ours else None)


def test_op_library_is_there_when_it_is_needed(engine: Path, packaged: Path) -> None:
    needed = Engine.load(engine, threads=1).manifest.op_library is not None
    assert (packaged / "librq_moe.so").exists() == needed
    assert ('kOpLibrary = "librq_moe.so"' in (packaged / "generate.cc").read_text()) == needed


def test_a_changed_bit_is_refused(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edge"
    assert rq_compile("package", stages / "model.onnx", "--for", "edge", "-o", folder, "-q").exit_code == 0
    assert rq_compile("inspect", folder / "model.onnx", "--verify").exit_code == 0
    weights = folder / json.loads((folder / "model.json").read_text())["weights"]["name"]
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    refused(rq_compile("inspect", folder / "model.onnx", "--verify"), 1, weights.name, "damaged")
    # Nor is it packaged again.
    refused(rq_compile("package", folder / "model.onnx", "--for", "edge", "-o", tmp_path / "again"), 1, weights.name, "damaged")
    assert not (tmp_path / "again").exists()


def test_an_encoder_decoder_is_refused(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    manifest = json.loads((stages / "model.json").read_text())
    for file in (manifest["graph"], manifest["weights"], manifest["tokenizer"]):
        shutil.copy(stages / file["name"], tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({**manifest, "encoder_decoder": True}))
    refused(rq_compile("package", tmp_path / "model.onnx", "--for", "edge", "-o", tmp_path / "edge"), 2, "encoder-decoder")
    assert not (tmp_path / "edge").exists()


def test_a_file_that_is_missing_is_refused(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    shutil.copy(stages / "model.onnx", tmp_path)
    refused(rq_compile("package", tmp_path / "model.onnx", "--for", "edge", "-o", tmp_path / "edge"), 2, "no manifest")
