"""The folder for a device is complete, is the same every time, and needs only ONNX Runtime."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from command_line import names, refused
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from rq_compile.engine.library import library_path
from rq_compile.files import sha256
from rq_compile.packaging.archive import write_files
from rq_compile.packaging.op_library import needed_versions, system_sentence
from rq_compile.runtime.engine import Engine
from rq_compile.standalone.sampling import SamplingParams

Command = Callable[..., Result]
PROMPT = [5, 9, 17, 3]
# The folder of an unpacked ONNX Runtime release (include/, lib/) for the C++ example; a wheel has the library, but not the
# headers.
ONNXRUNTIME = os.environ.get("ONNXRUNTIME")


@pytest.fixture(scope="module", params=["batched", "native"])
def engine(request: pytest.FixtureRequest) -> Path:
    """Two engines: one that needs no op library, and one that does."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def batched(compiled: Callable[[str, str], Path]) -> Path:
    return compiled("batched", "batched")


@pytest.fixture(scope="module")
def native(compiled: Callable[[str, str], Path]) -> Path:
    return compiled("cpu", "native")


@pytest.fixture(scope="module")
def compiled(
    rq_compile: Command, stages: Path, tiny_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    def compile_for(target: str, lowering: str) -> Path:
        folder = tmp_path_factory.mktemp(lowering)
        plan, path = folder / "plan.json", folder / "small.onnx"
        for arguments in (
            ("plan", stages / "calibration.json", "--target", target, "--memory", 0.6, "-o", plan),
            (tiny_checkpoint("olmoe"), "--plan", plan, "--lowering", lowering, "-o", path),
        ):
            result = rq_compile(*arguments, "-q")
            assert result.exit_code == 0, result.stderr
        return path

    return compile_for


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


def test_an_engine_of_an_earlier_release(engine: Path, rq_compile: Command, tmp_path: Path) -> None:
    """Version 1 of the manifest described caches by heads and dimension; the package has the keys that its script reads."""
    old = tmp_path / "old"
    old.mkdir()
    for file in engine.parent.glob("small.*"):
        shutil.copy(file, old)
    manifest = json.loads((old / "small.json").read_text())
    manifest["schema_version"] = 1
    for tensor in manifest["cache"]:
        _, tensor["heads"], _, tensor["dimension"] = tensor.pop("shape")
    for key in ("prefill_chunk", "recomputed_beyond", "linked", "remarks", "sampling", "chat_template", "special_tokens"):
        del manifest[key]
    (old / "small.json").write_text(json.dumps(manifest))
    result = rq_compile("package", old / "small.onnx", "--for", "edge", "-o", tmp_path / "edge", "-q")
    assert result.exit_code == 0, result.stderr
    said = run(sys.executable, tmp_path / "edge" / "generate.py", "--ids", *PROMPT, "--tokens", 6, cwd=tmp_path)
    assert [int(token) for token in said] == list(Engine.load(engine, threads=1).generate(PROMPT, 6))
    run("sha256sum", "--strict", "-c", "SHA256SUMS", cwd=tmp_path / "edge")


def test_python_example_continues_a_text(engine: Path, packaged: Path, tmp_path: Path) -> None:
    loaded = Engine.load(engine, threads=1)
    expected = loaded.tokenizer.decode(list(loaded.generate(loaded.tokenizer.encode("The hacker").ids, 5)))
    said = run(sys.executable, packaged / "generate.py", "The", "hacker", "--tokens", 5, cwd=tmp_path)
    assert "\n".join(said) == expected.rstrip("\n")


def test_python_example_chooses_tokens_as_the_engine_does(chat_engine: Path, rq_compile: Command, tmp_path: Path) -> None:
    """With the defaults of the checkpoint, and with options."""
    assert rq_compile("package", chat_engine, "--for", "edge", "-o", tmp_path / "edge", "-q").exit_code == 0
    engine, script = Engine.load(chat_engine, threads=1), tmp_path / "edge" / "generate.py"
    for options, params in (
        (["--seed", 3], replace(engine.default_sampling, seed=3)),
        (
            ["--temperature", 2, "--top-k", 9, "--repetition-penalty", 1.5, "--seed", 1],
            SamplingParams(2, 9, 0.95, 0, 1.5, seed=1),
        ),
    ):
        said = run(sys.executable, script, "--ids", *PROMPT, "--tokens", 12, *options, cwd=tmp_path)
        assert [int(token) for token in said] == list(engine.generate(PROMPT, 12, sampling=params))
    whole = run(sys.executable, script, "The", "--temperature", 0, cwd=tmp_path)[0]
    assert (
        run(sys.executable, script, "The", "--temperature", 0, "--stop", whole[5:7], cwd=tmp_path)[0]
        == whole.split(whole[5:7])[0]
    )
    refused = subprocess.run([sys.executable, script, "The", "--top-p", "7"], capture_output=True, text=True)
    assert refused.stderr.endswith("error: top_p is 7.0; give a number of 0 to 1\n")


@pytest.mark.skipif(ONNXRUNTIME is None, reason="ONNXRUNTIME names no ONNX Runtime release with its headers")
def test_cpp_example_generates_the_engines_tokens(engine: Path, packaged: Path, tmp_path: Path) -> None:
    release = Path(ONNXRUNTIME or "")
    program, libraries = tmp_path / "generate", release / "lib"
    links = ["-L", libraries, "-lonnxruntime", f"-Wl,-rpath,{libraries}"]
    run("g++", "-std=c++17", "-Wall", packaged / "generate.cc", "-I", release / "include", *links, "-o", program, cwd=tmp_path)
    in_place = [tensor.past for tensor in Engine.load(engine).manifest.cache if tensor.in_place]
    assert re.findall(r'"(past_key_values\.\S+?)"', (packaged / "generate.cc").read_text()) == in_place
    for prompt, tokens in ((PROMPT, 6), ((100 * PROMPT)[:250], 12)):  # there is room for 256 tokens at first
        said = run(program, packaged, tokens, *prompt, cwd=tmp_path)
        assert [int(token) for token in said] == list(Engine.load(engine, threads=1).generate(prompt, tokens))


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
        ours = name in (
            "LICENSE",
            "README.md",
            "generate.py",
            "decoding.py",
            "limits.py",
            "sampling.py",
            "text.py",
            "generate.cc",
            "librq_moe.so",
        )
        assert component.get("licenses") == ([declared(id="Apache-2.0")] if ours else None)


def declared(**licence: str) -> dict:
    return {"license": {**licence, "acknowledgement": "declared"}}


def test_the_models_licence_is_named_and_packed(rq_compile: Command, engine: Path, tmp_path: Path) -> None:
    for path in engine.parent.glob("small.*"):
        shutil.copy(path, tmp_path)
    text = tmp_path / "small.USE_POLICY.md"
    text.write_text("Use it well.\n")
    manifest = json.loads((tmp_path / "small.json").read_text())
    manifest["licences"] = [{"name": text.name, "sha256": sha256(text), "bytes": text.stat().st_size}]
    for licence, said in ((None, None), ("mit", declared(id="MIT")), ("llama3.1", declared(name="llama3.1"))):
        (tmp_path / "small.json").write_text(json.dumps({**manifest, "licence": licence}))
        folder = tmp_path / f"edge-{licence}"
        assert rq_compile("package", tmp_path / "small.onnx", "--for", "edge", "-o", folder, "-q").exit_code == 0
        assert (folder / text.name).read_text() == "Use it well.\n"
        content = (folder / "sbom.cdx.json").read_text()
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(content) is None
        bill = json.loads(content)
        of = {component["name"]: component.get("licenses") for component in bill["components"]}
        for name in ("small.onnx", "small.onnx.data", "small.tokenizer.json"):
            assert of[name] == ([said] if said else None)
        assert of[text.name] is None
        assert bill["metadata"]["component"].get("licenses") == ([said] if said else None)
        readme = (folder / "README.md").read_text()
        assert text.name in readme
        assert (f"({licence}, as its model card says)" in readme) == (licence is not None)


def test_op_library_is_there_when_it_is_needed(engine: Path, packaged: Path) -> None:
    needed = engine.parent.name.startswith("native")
    assert (packaged / "librq_moe.so").exists() == needed
    assert ('kOpLibrary = "librq_moe.so"' in (packaged / "generate.cc").read_text()) == needed


def unpacked(archive: Path, folder: Path) -> Path:
    shutil.unpack_archive(archive, folder)
    (root,) = folder.iterdir()
    return root


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".zip"])
def test_an_archive_holds_the_folder_and_is_the_same_every_time(
    rq_compile: Command, engine: Path, packaged: Path, tmp_path: Path, ending: str
) -> None:
    archives = [tmp_path / f"bundle{ending}", tmp_path / f"again{ending}"]
    for time, archive in enumerate(archives):
        os.utime(engine, (time * 10**6, time * 10**6))
        result = rq_compile("package", engine, "--for", "edge", "-o", archive, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["files"] == names(packaged)
    assert archives[0].read_bytes() == archives[1].read_bytes()
    root = unpacked(archives[0], tmp_path / "unpacked")
    assert root.name == "small"
    assert contents(root) == contents(packaged)
    assert names(tmp_path) == sorted([*(archive.name for archive in archives), "edge", "unpacked"])


def test_archive_entries_say_nothing_of_the_machine(rq_compile: Command, engine: Path, packaged: Path, tmp_path: Path) -> None:
    for ending in (".tar.gz", ".zip"):
        assert rq_compile("package", engine, "--for", "edge", "-o", tmp_path / f"bundle{ending}", "-q").exit_code == 0
    expected = [f"small/{name}" for name in names(packaged)]
    with tarfile.open(tmp_path / "bundle.tar.gz") as archive:
        entries = archive.getmembers()
    assert [entry.name for entry in entries] == expected
    assert {(e.mode, e.mtime, e.uid, e.gid, e.uname, e.gname) for e in entries} == {(0o644, 0, 0, 0, "", "")}
    assert int.from_bytes((tmp_path / "bundle.tar.gz").read_bytes()[4:8], "little") == 0  # gzip's own time
    with zipfile.ZipFile(tmp_path / "bundle.zip") as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == expected
    assert {(info.date_time, info.external_attr >> 16) for info in infos} == {((1980, 1, 1, 0, 0, 0), 0o644)}


@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
def test_an_archive_is_streamed(tmp_path: Path, ending: str) -> None:
    weights, size = tmp_path / "weights", 64 << 20
    with weights.open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    write_files({"weights": weights}, tmp_path / f"bundle{ending}", root="model")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 8
    assert (unpacked(tmp_path / f"bundle{ending}", tmp_path / "unpacked") / "weights").stat().st_size == size


def elf(path: Path, machine: int, rest: bytes = b"RegisterCustomOps\0", bits: int = 2) -> Path:
    header = b"\x7fELF" + bytes([bits, 1, 1]).ljust(12, b"\0") + (3).to_bytes(2, "little") + machine.to_bytes(2, "little")
    path.write_bytes(header + bytes(44) + rest)
    return path


@pytest.mark.parametrize(("number", "architecture"), [(62, "x86_64"), (183, "aarch64"), (243, "riscv64")])
def test_an_op_library_for_another_machine_is_packed(
    rq_compile: Command, native: Path, tmp_path: Path, number: int, architecture: str
) -> None:
    library = elf(tmp_path / "cross.so", number)
    arguments = (
        "package",
        native,
        "--for",
        "edge",
        "--library",
        library,
        "--architecture",
        architecture,
        "-o",
        tmp_path / "edge",
    )
    result = rq_compile(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "edge" / "librq_moe.so").read_bytes() == library.read_bytes()
    assert f"built for {architecture}" in json.loads(result.stdout)["remarks"][0]
    assert f"built for {architecture}" in (tmp_path / "edge" / "README.md").read_text()


def test_an_op_library_for_the_wrong_machine_is_refused(rq_compile: Command, native: Path, tmp_path: Path) -> None:
    def asked(*options: object) -> Result:
        return rq_compile("package", native, "--for", "edge", "-o", tmp_path / "edge", *options)

    library, other = tmp_path / "cross.so", "riscv64"
    refused(asked("--architecture", other), 2, "librq_moe.so is built for", f"not for {other}", "--library")
    refused(asked("--library", elf(library, 183), "--architecture", "x86_64"), 2, library, "built for aarch64, not for x86_64")
    refused(
        asked("--library", elf(library, 62, bits=1), "--architecture", "x86_64"), 2, library, "another system, not for x86_64"
    )
    refused(asked("--library", elf(library, 183, rest=b"")), 2, library, "is not an op library")
    library.write_bytes(b"")
    refused(asked("--library", library), 2, library, "is not an op library")
    refused(asked("--library", tmp_path / "missing.so"), 2, "missing.so", "No such file")
    assert names(tmp_path) == ["cross.so"]


def test_this_machines_op_library_is_for_this_machine(rq_compile: Command, native: Path, tmp_path: Path) -> None:
    arguments = ("package", native, "--for", "edge", "-o", tmp_path / "edge", "--architecture", platform.machine(), "-q")
    assert rq_compile(*arguments).exit_code == 0


def test_an_op_library_that_nothing_needs_is_refused(rq_compile: Command, batched: Path, tmp_path: Path) -> None:
    arguments = ("package", batched, "--for", "edge", "-o", tmp_path / "edge")
    refused(rq_compile(*arguments, "--library", elf(tmp_path / "cross.so", 183)), 2, "--library")
    # But it runs on every machine.
    assert rq_compile(*arguments, "--architecture", "aarch64", "-q").exit_code == 0


def test_a_changed_bit_is_refused(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edge"
    assert rq_compile("package", stages / "model.onnx", "--for", "edge", "-o", folder, "-q").exit_code == 0
    assert rq_compile("inspect", folder / "model.onnx", "--verify").exit_code == 0
    weights = folder / json.loads((folder / "model.json").read_text())["weights"]["name"]
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    refused(rq_compile("inspect", folder / "model.onnx", "--verify"), 1, weights.name, "damaged")
    # It is not packaged again either.
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


# System requirements of the op library


def test_the_package_states_the_least_versions_of_the_system_s_libraries(rq_compile: Command, stages: Path, out: Path) -> None:
    result = rq_compile("package", stages / "model.onnx", "--for", "edge", "-o", out / "edge", "--json")
    assert result.exit_code == 0, result.stderr
    needed = needed_versions(library_path())
    told = (
        shutil.which("objdump")
        and subprocess.run(["objdump", "-T", library_path()], capture_output=True, text=True, check=True).stdout
    )
    for name in ("GLIBC", "GLIBCXX"):
        if told:
            versions = [tuple(map(int, version.split("."))) for version in re.findall(rf"{name}_([\d.]+)\)", told)]
            assert needed[name] == ".".join(map(str, max(versions)))
    sentence = f"it loads on systems that have at least glibc {needed['GLIBC']} and a libstdc++ with GLIBCXX_{needed['GLIBCXX']}"
    assert sentence in json.loads(result.stdout)["remarks"][0]
    assert sentence in (out / "edge" / "README.md").read_text()
    parts = {part["name"]: part for part in json.loads((out / "edge" / "sbom.cdx.json").read_text())["components"]}
    assert sentence in parts["librq_moe.so"]["description"]


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF\2\1\1" + bytes(57), b"\x7fELF\2\1\1" + b"\xff" * 500, b"text"])
def test_what_is_no_whole_library_asks_for_nothing(out: Path, content: bytes) -> None:
    (out / "library.so").write_bytes(content)
    assert needed_versions(out / "library.so") == {}
    assert system_sentence(out / "library.so") == "it does not require a version of glibc"
