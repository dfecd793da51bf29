"""The model repository for Triton: what it holds, and a real ``tritonserver`` that serves it."""

import json
import os
import queue
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import triton_stand_in as stand_in
import tritonclient.grpc as grpc
import tritonclient.http as http
from click.testing import Result
from command_line import refused
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from rq_compile.files import sha256
from rq_compile.packaging.triton_python import CONCURRENT_REQUESTS
from rq_compile.runtime.engine import Engine

Command = Callable[..., Result]
# That of nvidia-pytriton, in an environment with the packages that a packaged model.py needs.
SERVER = Path(os.environ.get("TRITONSERVER", Path(__file__).parent.parent / ".venv-triton" / "bin" / "tritonserver"))
needs_server = pytest.mark.skipif(
    not SERVER.is_file(), reason=f"no {SERVER}: run make .venv-triton/bin/tritonserver or set TRITONSERVER"
)
PROMPTS = ["The hacker", "A jargon file", "hack", "Unix is", "To be", "In the beginning", "foo bar", "he said"]
STAND_IN = "stand-in"
LONGEST = 10**6


@pytest.fixture(scope="module")
def engines(rq_compile: Command, stages: Path, tiny_checkpoint: Callable, tmp_path_factory) -> dict[str, Path]:
    """One engine that needs no op library, one that does."""
    folder = tmp_path_factory.mktemp("native")
    plan, path = folder / "plan.json", folder / "native.onnx"
    succeed(rq_compile("plan", stages / "calibration.json", "--target", "cpu", "--memory", 0.6, "-o", plan, "-q"))
    succeed(rq_compile(tiny_checkpoint("olmoe"), "--plan", plan, "-o", path, "-q"))
    return {"model": stages / "model.onnx", "native": path}


@pytest.fixture(scope="module")
def repositories(rq_compile: Command, engines: dict[str, Path], tmp_path_factory) -> list[Path]:
    """Both engines in the python flavour, and one in the onnxruntime flavour with a stand-in for the backend; read only."""
    root = tmp_path_factory.mktemp("repositories")
    for name, engine in engines.items():
        succeed(rq_compile("package", engine, "--for", "triton", "--threads", 1, "-o", root / name, "-q"))
    allow_long_sequences(root / "native" / "native")
    flavour = ("--flavour", "onnxruntime", "--mount", root / STAND_IN, "--name", STAND_IN, "--threads", 1)
    succeed(rq_compile("package", engines["native"], "--for", "triton", *flavour, "-o", root / STAND_IN, "-q"))
    replace_backend(root / STAND_IN / STAND_IN)
    return [root / name for name in (*engines, STAND_IN)]


def replace_backend(model: Path) -> None:
    config = read_config(model)
    (model / "1" / stand_in.CONFIG).write_text(as_json(config))
    shutil.copy(stand_in.__file__, model / "1" / "model.py")
    config.backend = "python"
    config.default_model_filename = "model.py"
    (model / "config.pbtxt").write_text(text_format.MessageToString(config))


def allow_long_sequences(model: Path) -> None:
    config = read_config(model)
    config.parameters["max_sequence_length"].string_value = str(LONGEST)
    (model / "config.pbtxt").write_text(text_format.MessageToString(config))


def read_config(model: Path) -> ModelConfig:
    return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())


def as_json(config: ModelConfig) -> str:
    return json_format.MessageToJson(config, preserving_proto_field_name=True)


def succeed(result: Result) -> Result:
    assert result.exit_code == 0, result.stderr
    return result


class Server:
    """A running ``tritonserver``; ``http`` and ``grpc`` are its addresses."""

    def __init__(self, repositories: list[Path], log: Path) -> None:
        ports = free_ports(2)
        self.http, self.grpc = (f"127.0.0.1:{port}" for port in ports)
        words = [SERVER, *(f"--model-repository={path}" for path in repositories), "--model-control-mode=explicit"]
        words += ["--load-model=*", "--allow-metrics=false", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*words, f"--http-port={ports[0]}", f"--grpc-port={ports[1]}"], stdout=file, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> "Server":
        try:
            for _ in range(600):
                assert self.process.poll() is None, self.log.read_text()
                if self.ready():
                    return self
                time.sleep(0.1)
            raise AssertionError(f"not ready in a minute: {self.log.read_text()}")
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()

    def ready(self, model: str = "") -> bool:
        path = f"models/{model}/ready" if model else "health/ready"
        try:
            return urllib.request.urlopen(f"http://{self.http}/v2/{path}").status == 200
        except OSError:
            return False

    def post(self, model: str, verb: str, **request: object) -> str:
        url = f"http://{self.http}/v2/models/{model}/{verb}"
        return urllib.request.urlopen(url, json.dumps(request).encode(), timeout=60).read().decode()

    def generate(self, model: str, **request: object) -> tuple[str, list[int]]:
        answer = json.loads(self.post(model, "generate", **request))
        return answer["text_output"], np.ravel(answer["token_ids"]).tolist()

    def stream(self, model: str, **request: object) -> list[tuple[str, list[int]]]:
        """Each token with its text, over gRPC."""
        responses: queue.Queue = queue.Queue()
        with grpc.InferenceServerClient(self.grpc) as client:
            client.start_stream(lambda result, error: responses.put(error or result))
            client.async_stream_infer(model, tensors(request | {"stream": True}), enable_empty_final_response=True)
            return list(pieces(responses))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


def tensors(request: dict[str, object]) -> list[grpc.InferInput]:
    kinds = {"text_input": ("BYTES", np.object_), "input_ids": ("INT64", np.int64), "max_tokens": ("INT32", np.int32)}
    inputs = []
    for name, value in request.items():
        kind, dtype = kinds.get(name, ("BOOL", np.bool_))
        array = np.atleast_1d(np.array(value, dtype))
        inputs.append(grpc.InferInput(name, array.shape, kind))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def pieces(responses: queue.Queue) -> Iterator[tuple[str, list[int]]]:
    while True:
        result = responses.get(timeout=60)
        if isinstance(result, Exception):
            raise result
        if result.get_response().parameters["triton_final_response"].bool_param:
            return
        yield result.as_numpy("text_output")[0].decode(), result.as_numpy("token_ids").tolist()


@pytest.fixture(scope="module")
def server(repositories: list[Path], tmp_path_factory) -> Iterator[Server]:
    with Server(repositories, tmp_path_factory.mktemp("log") / "server.log") as running:
        yield running


@pytest.fixture(scope="module")
def expected(rq_compile: Command, engines: dict[str, Path]) -> Callable[[str, str], tuple[str, list[int]]]:
    """Text and tokens of ``rq-compile generate``, twelve at most."""

    def run(model: str, prompt: str) -> tuple[str, list[int]]:
        command = ("generate", engines[model], "--prompt", prompt, "--max-tokens", 12, "--threads", 1, "--json")
        said = json.loads(succeed(rq_compile(*command)).stdout)
        return said["text"], said["tokens"]

    return run


# The server.


@needs_server
@pytest.mark.parametrize("model", ["model", "native"])
def test_generate_gives_the_text_and_tokens_of_rq_compile_generate(server: Server, expected: Callable, model: str) -> None:
    for prompt in PROMPTS[:3]:
        assert server.generate(model, text_input=prompt, max_tokens=12) == expected(model, prompt)


@needs_server
def test_streams_give_the_same_token_by_token(server: Server, expected: Callable) -> None:
    text, tokens = expected("native", PROMPTS[0])
    request = {"text_input": PROMPTS[0], "max_tokens": 12}
    lines = server.post("native", "generate_stream", **request, stream=True).splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert [event["token_ids"] for event in events] == tokens
    streamed = server.stream("native", **request)
    assert [ids for _, ids in streamed] == [[token] for token in tokens]
    assert "".join(piece for piece, _ in streamed) == "".join(event["text_output"] for event in events) == text.rstrip("\ufffd")


@needs_server
def test_token_ids_are_taken_instead_of_text(server: Server, engines: dict[str, Path]) -> None:
    tokens = list(Engine.load(engines["native"], threads=1).generate([5, 9, 17, 3], 6))
    assert server.generate("native", input_ids=[5, 9, 17, 3], max_tokens=6)[1] == tokens


@needs_server
def test_eight_clients_at_once_get_what_each_would_get_alone(server: Server, expected: Callable) -> None:
    def ask(number: int) -> list[int]:
        request = {"text_input": PROMPTS[number], "max_tokens": 12}
        if number % 2:
            return [token for _, ids in server.stream("native", **request) for token in ids]
        return server.generate("native", **request)[1]

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, range(8)))
    assert answers == [expected("native", prompt)[1] for prompt in PROMPTS]


@needs_server
def test_a_short_request_does_not_wait_for_long_ones_until_they_take_all_places_and_gets_one_that_is_cancelled(
    server: Server, engines: dict[str, Path], expected: Callable
) -> None:
    engine = Engine.load(engines["native"], threads=1)
    endless = next(prompt for prompt in ([token] for token in range(2, 128)) if len(list(engine.generate(prompt, 600))) == 600)
    inputs = tensors({"input_ids": endless, "max_tokens": LONGEST - 1, "stream": True})
    responses: queue.Queue = queue.Queue()
    with grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: responses.put(error or result))
        for places in (CONCURRENT_REQUESTS - 1, 1):
            for _ in range(places):
                client.async_stream_infer("native", inputs, enable_empty_final_response=True)
            if places > 1:
                assert server.generate("native", text_input=PROMPTS[1], max_tokens=12) == expected("native", PROMPTS[1])
        client.stop_stream(cancel_requests=True)
    with pytest.raises(InferenceServerException, match="cancelled"):
        list(pieces(responses))
    assert server.generate("native", text_input=PROMPTS[1], max_tokens=12) == expected("native", PROMPTS[1])


@needs_server
@pytest.mark.parametrize(
    ("request_", "word"),
    [
        ({}, "either text_input or input_ids"),
        ({"text_input": "a", "input_ids": [1]}, "either text_input or input_ids"),
        ({"text_input": ""}, "empty"),
        ({"input_ids": [1, 10**6]}, "outside the vocabulary"),
        ({"input_ids": [-1]}, "outside the vocabulary"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens is 0"),
        ({"text_input": "a", "max_tokens": 2**30}, "max_sequence_length"),
        ({"text_input": ["a", "b"]}, "proper shape"),
        ({"text_input": "a", "max_tokens": "many"}, "integer"),
    ],
)
def test_a_bad_request_gets_an_error_and_the_server_lives(
    server: Server, expected: Callable, request_: dict[str, object], word: str
) -> None:
    for verb in ("generate", "generate_stream"):
        with pytest.raises(urllib.error.HTTPError) as failure:
            server.post("native", verb, **({"max_tokens": 4} | request_))
        assert 400 <= failure.value.code < 600
        assert word in failure.value.read().decode()
    assert server.generate("native", text_input=PROMPTS[0], max_tokens=12) == expected("native", PROMPTS[0])


@needs_server
def test_bytes_that_are_no_text_and_a_request_without_stream_are_refused(server: Server, expected: Callable) -> None:
    with pytest.raises(InferenceServerException, match="not UTF-8"):
        server.stream("native", text_input=b"\xff\xfe")
    # Triton's plain inference route has no place for several answers.
    text = http.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"a"], np.object_))
    with http.InferenceServerClient(server.http) as client, pytest.raises(InferenceServerException, match="decoupled"):
        client.infer("native", [text])
    assert server.generate("native", text_input=PROMPTS[0], max_tokens=12) == expected("native", PROMPTS[0])


@needs_server
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_unload_and_reload(server: Server, expected: Callable, protocol: str) -> None:
    with {"http": http, "grpc": grpc}[protocol].InferenceServerClient(getattr(server, protocol)) as client:
        client.unload_model("native")
        wait_until(lambda: not client.is_model_ready("native"))
        assert server.generate("model", text_input=PROMPTS[0], max_tokens=12) == expected("model", PROMPTS[0])
        client.load_model("native")
        assert client.is_model_ready("native")
    assert server.generate("native", text_input=PROMPTS[0], max_tokens=12) == expected("native", PROMPTS[0])


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("not within twenty seconds")


@needs_server
def test_a_folder_that_was_moved_is_served_after_a_restart(repositories: list[Path], expected: Callable, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(repositories[1], first)
    for folder in (first, second):
        with Server([folder], tmp_path / "server.log") as server:
            assert server.generate("native", text_input=PROMPTS[0], max_tokens=12) == expected("native", PROMPTS[0])
        assert server.process.returncode == 0
        if folder == first:
            first.rename(second)


@needs_server
def test_a_damaged_engine_does_not_load_and_the_others_serve(
    server: Server, repositories: list[Path], expected: Callable
) -> None:
    graph = repositories[0] / "model" / "1" / "model.onnx"
    whole = graph.read_bytes()
    with http.InferenceServerClient(server.http) as client:
        try:
            client.unload_model("model")
            wait_until(lambda: not client.is_model_ready("model"))
            graph.write_bytes(whole[: len(whole) // 2])
            with pytest.raises(InferenceServerException, match="load failed"):
                client.load_model("model")
            assert server.generate("native", text_input=PROMPTS[0], max_tokens=12) == expected("native", PROMPTS[0])
        finally:
            graph.write_bytes(whole)
        client.load_model("model")
    assert server.generate("model", text_input=PROMPTS[0], max_tokens=12) == expected("model", PROMPTS[0])


# The onnxruntime flavour.


class Client:
    """Generates with the cache on its own side, one request a step."""

    def __init__(self, server: Server, engine: Path) -> None:
        self.client = grpc.InferenceServerClient(server.grpc)
        self.cache = Engine.load(engine, threads=1).manifest.cache

    def generate(self, prompt: list[int], count: int) -> list[int]:
        past = {tensor.past: np.zeros((1, tensor.heads, 0, tensor.dimension), np.float32) for tensor in self.cache}
        ids, length, tokens = np.array([prompt], np.int64), 0, []
        while len(tokens) < count:
            start, length = length, length + ids.shape[1]
            feeds = {
                "input_ids": ids,
                "attention_mask": np.ones((1, length), np.int64),
                "position_ids": np.arange(start, length, dtype=np.int64)[None],
            }
            result = self.client.infer(STAND_IN, [self.tensor(*feed) for feed in (feeds | past).items()])
            past = {tensor.past: result.as_numpy(tensor.present) for tensor in self.cache}
            tokens.append(int(result.as_numpy("logits")[0, -1].argmax()))
            ids = np.array([tokens[-1:]], np.int64)
        return tokens

    @staticmethod
    def tensor(name: str, array: np.ndarray) -> grpc.InferInput:
        made = grpc.InferInput(name, array.shape, "INT64" if array.dtype == np.int64 else "FP32")
        made.set_data_from_numpy(array)
        return made


@needs_server
def test_onnxruntime_config_serves_clients_that_hold_the_cache_and_batches_their_equal_shapes(
    server: Server, engines: dict[str, Path]
) -> None:
    engine = Engine.load(engines["native"], threads=1)
    prompts = np.random.default_rng().integers(0, engine.manifest.vocabulary, (8, 5)).tolist()
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda prompt: Client(server, engines["native"]).generate(prompt, 8), prompts))
    assert answers == [list(engine.generate(prompt, 8, stop=False)) for prompt in prompts]
    statistics = http.InferenceServerClient(server.http).get_inference_statistics(STAND_IN)["model_stats"][0]
    assert statistics["execution_count"] < statistics["inference_count"]
    assert {batch["batch_size"] for batch in statistics["batch_stats"]} - {1}


@pytest.mark.parametrize("name", ["model", "native"])
def test_onnxruntime_config_opens_the_session_of_the_engine(
    rq_compile: Command, engines: dict[str, Path], tmp_path: Path, name: str
) -> None:
    mount = tmp_path / "repository"
    options = ("--flavour", "onnxruntime", "--mount", mount, "--threads", 1, "--instances", 2)
    succeed(rq_compile("package", engines[name], "--for", "triton", *options, "-o", mount, "-q"))
    config = read_config(mount / name)
    assert set(config.parameters) <= stand_in.PARAMETERS
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert (config.name, config.backend, config.instance_group[0].count) == (name, "onnxruntime", 2)

    session = stand_in.open_session(json.loads(as_json(config)), mount / name / "1")
    graph = {tensor.name: tensor.shape for tensor in session.get_inputs()}
    dims = {tensor.name: [*tensor.dims] for tensor in config.input}
    assert {key: [-1 if isinstance(dim, str) else dim for dim in shape[1:]] for key, shape in graph.items()} == dims
    engine = Engine.load(engines[name], threads=1)
    ids = np.random.default_rng().integers(0, engine.manifest.vocabulary, (2, 7))
    feeds = {key: value for key, value in engine._feeds(ids, None, None).items() if key in graph}
    np.testing.assert_array_equal(session.run(["logits"], feeds)[0], engine.logits(ids))


def test_op_library_lies_under_the_mount_and_is_named_by_its_content(
    rq_compile: Command, engines: dict[str, Path], tmp_path: Path
) -> None:
    options = ("--flavour", "onnxruntime", "--mount", "/srv/models/", "--name", "moe-1")
    succeed(rq_compile("package", engines["native"], "--for", "triton", *options, "-o", tmp_path / "out", "-q"))
    (path,) = read_config(tmp_path / "out" / "moe-1").model_operations.op_library_filename
    assert Path(path).parent == Path("/srv/models/moe-1/1")
    library = tmp_path / "out" / "moe-1" / "1" / Path(path).name
    assert sha256(library)[:16] in library.name


def test_workload_is_that_of_the_calibration(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    package = ("package", stages / "model.onnx", "--for", "triton", "--flavour", "onnxruntime", "--calibration")
    succeed(rq_compile(*package, stages / "calibration.json", "-o", tmp_path / "out", "-q"))
    calibration = json.loads((stages / "calibration.json").read_text())
    model = tmp_path / "out" / "model"
    config = read_config(model)
    assert config.max_batch_size == calibration["batch_size"]
    prompt, step = config.model_warmup
    assert [*prompt.inputs["input_ids"].dims] == [calibration["sequence_length"]]
    assert [*step.inputs["input_ids"].dims] == [1]
    for request in (prompt, step):
        mask = request.inputs["attention_mask"]
        ones = np.frombuffer((model / "warmup" / mask.input_data_file).read_bytes(), np.int64)
        assert ones.tolist() == [1] * mask.dims[0]
        assert mask.dims[0] == request.inputs["input_ids"].dims[0] + request.inputs["past_key_values.0.key"].dims[1]

    other = tmp_path / "calibration.json"
    other.write_text(json.dumps({**calibration, "batch_size": 3}))
    refused(rq_compile(*package, other, "-o", tmp_path / "other"), 2, "not planned with", other)


def test_requests_are_not_batched_where_an_answer_would_depend_on_it(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    package = ("package", "--for", "triton", "--flavour", "onnxruntime", "--json")
    engine = copy_engine(stages, tmp_path)
    alike = succeed(rq_compile(*package, engine, "-o", tmp_path / "alike"))
    assert read_config(tmp_path / "alike" / "model").HasField("dynamic_batching")
    assert "share a batch only" in alike.stdout

    manifest = json.loads((tmp_path / "model.json").read_text())
    slots = manifest["plan"]["layers"][0]["slots"]
    slots.append({**slots[0], "format": "int4" if slots[0]["format"] != "int4" else "int8"})
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    mixed = succeed(rq_compile(*package, engine, "-o", tmp_path / "mixed"))
    assert not read_config(tmp_path / "mixed" / "model").HasField("dynamic_batching")
    assert "not batched" in mixed.stdout


def copy_engine(stages: Path, folder: Path) -> Path:
    manifest = json.loads((stages / "model.json").read_text())
    for name in ("model.json", *(manifest[part]["name"] for part in ("graph", "weights", "tokenizer"))):
        shutil.copy(stages / name, folder)
    return folder / "model.onnx"


# What both write.


@pytest.mark.parametrize("flavour", ["python", "onnxruntime"])
def test_two_runs_give_the_same_bytes_with_right_checksums_and_an_engine_that_verifies(
    rq_compile: Command, engines: dict[str, Path], tmp_path: Path, flavour: str
) -> None:
    for name in ("once", "again"):
        package = ("package", engines["native"], "--for", "triton", "--flavour", flavour, "-o", tmp_path / name, "--json")
        listed = json.loads(succeed(rq_compile(*package)).stdout)["files"]
    once, again = (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "once", tmp_path / "again")
    )
    assert once == again
    assert sorted(once) == sorted(listed)
    checked = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path / "once", capture_output=True, text=True, check=True
    )
    assert sorted(checked.stdout.splitlines()) == sorted(f"{name}: OK" for name in once if name != "SHA256SUMS")
    succeed(rq_compile("inspect", tmp_path / "once" / "native" / "1" / "native.onnx", "--verify"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--name", "a/b"], ["'a/b'", "--name"]),
        (["--mount", "/models"], ["--mount", "--flavour python"]),
        (["--flavour", "onnxruntime", "--mount", "models"], ["--mount models", "not absolute"]),
        (["--flavour", "onnxruntime", "--calibration", "missing.json"], ["missing.json"]),
    ],
)
def test_what_cannot_work_is_refused(
    rq_compile: Command, stages: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    refused(rq_compile("package", stages / "model.onnx", "--for", "triton", *options, "-o", tmp_path / "out"), 2, *words)
    assert not (tmp_path / "out").exists()


def test_flavour_is_for_triton_alone(rq_compile: Command, stages: Path, tmp_path: Path) -> None:
    package = ("package", stages / "model.onnx", "--for", "edge", "--flavour", "python", "-o", tmp_path / "out")
    refused(rq_compile(*package), 2, "--flavour", "--for edge")


def test_a_missing_tritonclient_is_named(
    rq_compile: Command, stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tritonclient.grpc", None)
    refused(rq_compile("package", stages / "model.onnx", "--for", "triton", "-o", tmp_path / "out"), 2, "pip install")
