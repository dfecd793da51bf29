"""onnxruntime-genai's generate loop with our engine."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from command_line import names, refused
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from rq_compile.files import sha256
from rq_compile.lowerings.batched import FOLDING_LIMIT
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.files import read_manifest

genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

Command = Callable[..., Result]
PROMPT = [5, 9, 17, 3, 40, 22]
SAMPLE = Path(__file__).parents[2] / "samples" / "olmoe"


@pytest.fixture(scope="module", params=["batched", "native"])
def engine(
    request: pytest.FixtureRequest,
    rq_compile: Command,
    stages: Path,
    tiny_checkpoint: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two engines: one that needs no op library, and one that does."""
    if request.param == "batched":
        return stages / "model.onnx"
    path = tmp_path_factory.mktemp("native") / "small.onnx"
    result = rq_compile(tiny_checkpoint("olmoe"), "--text", stages / "text.txt", "--memory", 0.6, "-o", path, "-q")
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture
def packaged(rq_compile: Command, engine: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "genai"
    result = rq_compile("package", engine, "--for", "onnxruntime-genai", "-o", folder, "--context-length", 64, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["files"] == names(folder)
    return folder


def generate(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """``count`` greedy tokens after each of ``prompts``, which have the same length."""
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompts[0]) + count, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.asarray(prompts, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[len(prompts[0]) :].tolist() for row in range(len(prompts))]


def until_end(tokens: list[int], ends: list[int]) -> list[int]:
    return tokens[: next((at for at, token in enumerate(tokens) if token in ends), None)]


def test_its_loop_generates_the_engines_tokens(
    engine: Path, packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the op library is found from the folder, not from here
    loaded = Engine.load(engine, threads=1)
    ends = loaded.manifest.end_of_text
    for prompt in (PROMPT, [7], [*ends, 30, *ends, 12]):
        assert until_end(generate(packaged, [prompt], 12)[0], ends) == list(loaded.generate(prompt, 12))


def test_session_options_are_those_the_engine_needs(engine: Path, packaged: Path) -> None:
    options = json.loads((packaged / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    if Engine.load(engine, threads=1).manifest.op_library is None:
        assert options == {"provider_options": [], **FOLDING_LIMIT}
    else:
        assert options == {"provider_options": [], "custom_ops_library": "librq_moe.so"}
        assert (packaged / "librq_moe.so").is_file()


def test_a_batch_whose_rows_are_padded(engine: Path, packaged: Path) -> None:
    loaded = Engine.load(engine, threads=1)
    pad = json.loads((packaged / "genai_config.json").read_text())["model"]["pad_token_id"]
    short, long = PROMPT[:4], [44, 8, 60, 21, 33, 9]
    rows = generate(packaged, [[*short, pad, pad], long], 8)
    for prompt, row in zip((short, long), rows, strict=True):
        assert until_end(row, loaded.manifest.end_of_text) == list(loaded.generate(prompt, 8))


def test_the_folder_stays_an_engine_of_ours(rq_compile: Command, engine: Path, packaged: Path) -> None:
    assert rq_compile("inspect", packaged / engine.name, "--verify").exit_code == 0
    assert list(Engine.load(packaged / engine.name, 1).generate(PROMPT, 4)) == list(Engine.load(engine, 1).generate(PROMPT, 4))


def test_two_runs_give_the_same_bytes(rq_compile: Command, engine: Path, packaged: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere"
    arguments = ("package", engine, "--for", "onnxruntime-genai", "-o", again, "--context-length", 64, "-q")
    assert rq_compile(*arguments).exit_code == 0
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in packaged.iterdir()
    }


def test_a_sequence_ends_at_the_context_length(packaged: Path) -> None:
    with pytest.raises(Exception, match="context_length"):
        generate(packaged, [PROMPT], 59)


@pytest.mark.parametrize("start", [False, True])
def test_its_tokenizer_gives_the_engines_ids(
    rq_compile: Command, tmp_path: Path, rewritten: Callable[..., Path], start: bool
) -> None:
    tokenizer = Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))
    if start:
        end = tokenizer.id_to_token(0)
        tokenizer.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    folder = tmp_path / "genai"
    said = rq_compile(
        "package", rewritten(tokenizer=tmp_path / "tokenizer.json"), "--for", "onnxruntime-genai", "-o", folder, "--json"
    )
    assert ("add_special_tokens" in said.stdout) == start
    theirs = genai.Tokenizer(genai.Model(str(folder)))
    theirs.update_options(add_special_tokens=str(start).lower())
    for text in ("And the LORD said unto", "  naïve café — 日本\n\n it's 12345", "a<|endoftext|>b"):
        ids = tokenizer.encode(text).ids
        assert theirs.encode(text).tolist() == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)


def test_the_command_line_that_is_shown_runs(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's"
    result = json.loads(rq_compile("package", stages / "model.onnx", "--for", "onnxruntime-genai", "-o", folder, "--json").stdout)
    assert any("cannot read this engine's tokenizer" in remark for remark in result["remarks"])  # one word a character
    assert "tokenizer_config.json" not in result["files"]
    command = result["run"][0].replace("python ", f"{sys.executable} ", 1)
    ran = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    shown = [int(token) for token in ran.stdout.strip().strip("[]").split()]
    expected = list(Engine.load(stages / "model.onnx", 1).generate([1, 2, 3], 29))
    assert shown[:3] == [1, 2, 3]
    assert until_end(shown[3:], Engine.load(stages / "model.onnx", 1).manifest.end_of_text) == expected


@pytest.fixture
def rewritten(stages: Path, tmp_path: Path) -> Callable[..., Path]:
    """The engine of ``stages`` with a different tokenizer, or different values in its manifest."""

    def rewrite(tokenizer: Path | None = None, **values: Any) -> Path:
        folder = tmp_path / "rewritten"
        shutil.copytree(stages, folder)
        manifest = json.loads((folder / "model.json").read_text()) | values
        if tokenizer is not None:
            kept = folder / manifest["tokenizer"]["name"]
            shutil.copy(tokenizer, kept)
            manifest["tokenizer"] |= {"sha256": sha256(kept), "bytes": kept.stat().st_size}
        (folder / "model.json").write_text(json.dumps(manifest))
        return folder / "model.onnx"

    return rewrite


LATENT = [
    {"past": f"past_key_values.{layer}.{kind}", "present": f"present.{layer}.{kind}", "shape": ["batch", 1, "past", dimension]}
    for layer in range(2)
    for kind, dimension in (("key", 64), ("value", 16))
]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"encoder_decoder": True}, ["encoder-decoder"]),
        ({"context_length": None}, ["context length", "--context-length"]),
        ({"end_of_text": []}, ["no end-of-text token"]),
        ({"cache": LATENT}, ["1 x 16 and 1 x 64", "--for edge"]),
    ],
)
def test_what_it_cannot_run_is_refused(
    rq_compile: Command, rewritten: Callable[..., Path], tmp_path: Path, values: dict[str, Any], words: list[str]
) -> None:
    source = rewritten(**values)
    refused(rq_compile("package", source, "--for", "onnxruntime-genai", "-o", tmp_path / "genai"), 2, *words)
    assert not (tmp_path / "genai").exists()


def test_a_damaged_engine_is_refused(rq_compile: Command, rewritten: Callable[..., Path], tmp_path: Path) -> None:
    source = rewritten()
    weights = source.parent / read_manifest(source).weights.name
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    refused(rq_compile("package", source, "--for", "onnxruntime-genai", "-o", tmp_path / "genai"), 1, "damaged")


def test_context_length_is_for_this_destination_alone(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    arguments = ("package", stages / "model.onnx", "--for", "edge", "--context-length", 64, "-o", tmp_path / "edge")
    refused(rq_compile(*arguments), 2, "--context-length has no effect with --for edge")


def test_a_manifest_called_as_a_file_of_its_own_is_refused(
    rq_compile: Command, stages: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "tokenizer.onnx"
    assert rq_compile(tiny_checkpoint("olmoe"), "--plan", stages / "plan.json", "-o", source).exit_code == 0
    arguments = ("package", source, "--for", "onnxruntime-genai", "--context-length", 64, "-o", tmp_path / "genai")
    refused(rq_compile(*arguments), 2, "tokenizer.json would be both the manifest", "compile to another name")
    assert not (tmp_path / "genai").exists()
