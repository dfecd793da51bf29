"""The folder for a device is complete, and needs only ONNX Runtime."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import names, refused
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from edge_packages import Command, contents

from rq_compile.files import sha256
from rq_compile.runtime.engine import Engine
from rq_compile.standalone.sampling import SamplingParams

PROMPT = [5, 9, 17, 3]
# The folder of an unpacked ONNX Runtime release (include/, lib/) for the C++ example; a wheel has the library, but not the
# headers.
ONNXRUNTIME = os.environ.get("ONNXRUNTIME")


def run(*command: object, cwd: Path) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_python_example_generates_the_engines_tokens_without_rq_compile(engine: Path, packaged: Path, tmp_path: Path) -> None:
    before = contents(packaged)
    blocked = (
        "import runpy, sys; sys.modules['rq_compile'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); assert not {'torch', 'onnx', 'tokenizers'} & set(sys.modules)"
    )
    said = run(sys.executable, "-P", "-c", blocked, packaged / "generate.py", "--ids", *PROMPT, "--tokens", 6, cwd=tmp_path)
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
