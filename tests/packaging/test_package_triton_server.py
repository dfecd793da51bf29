"""A real ``tritonserver`` serves the packages: it returns the tokens of ``rq-compile generate``, whatever clients do."""

import json
import queue
import shutil
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_stand_in as stand_in
import tritonclient.grpc as grpc
import tritonclient.http as http
from triton_server import (
    Command,
    Server,
    as_json,
    compile_native,
    needs_server,
    pieces,
    read_config,
    succeed,
    tensors,
    write_config,
)
from tritonclient.utils import InferenceServerException

import rq_compile as rq
from rq_compile.runtime.engine import Engine
from rq_compile.standalone.sampling import GREEDY, sampling_params
from rq_compile.standalone.scheduler import SLOTS

pytestmark = needs_server
PROMPTS = ["The hacker", "A jargon file", "hack", "Unix is", "To be", "In the beginning", "foo bar", "he said"]
STAND_IN = "stand-in"
ENDLESS = "endless"
TALK = "talk"
SAID = [{"role": "user", "content": "Hello"}]
LONGEST = 10**5


@pytest.fixture(scope="module")
def engines(
    rq_compile: Command, stages: Path, tiny_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two engines: one that needs no op library, and one that does."""
    native = compile_native(rq_compile, stages, tiny_checkpoint("olmoe"), tmp_path_factory.mktemp("native"))
    return {"model": stages / "model.onnx", "native": native}


@pytest.fixture(scope="module")
def repositories(
    rq_compile: Command, engines: dict[str, Path], chat_engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Both engines in the python flavour, one of them also without end-of-text tokens, and in the onnxruntime flavour with a
    stand-in for the backend; and an engine with a chat template."""
    root = tmp_path_factory.mktemp("repositories")
    for name, engine in engines.items():
        succeed(rq_compile("package", engine, "--for", "triton", "--threads", 1, "-o", root / name, "-q"))
    succeed(
        rq_compile("package", engines["native"], "--for", "triton", "--name", ENDLESS, "--threads", 1, "-o", root / ENDLESS, "-q")
    )
    never_end(root / ENDLESS / ENDLESS)
    flavour = ("--flavour", "onnxruntime", "--mount", root / STAND_IN, "--name", STAND_IN, "--threads", 1)
    succeed(rq_compile("package", engines["native"], "--for", "triton", *flavour, "-o", root / STAND_IN, "-q"))
    replace_backend(root / STAND_IN / STAND_IN)
    succeed(rq_compile("package", chat_engine, "--for", "triton", "--name", TALK, "--threads", 1, "-o", root / TALK, "-q"))
    return [root / name for name in (*engines, ENDLESS, STAND_IN, TALK)]


def replace_backend(model: Path) -> None:
    config = read_config(model)
    (model / "1" / stand_in.CONFIG).write_text(as_json(config))
    shutil.copy(stand_in.__file__, model / "1" / "model.py")
    config.backend = "python"
    config.default_model_filename = "model.py"
    write_config(config, model)


def never_end(model: Path) -> None:
    """This model has no end-of-text token, and its texts may be as long as LONGEST."""
    config = read_config(model)
    config.parameters["max_sequence_length"].string_value = str(LONGEST)
    write_config(config, model)
    manifest = model / "1" / "native.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "end_of_text": []}))


@pytest.fixture(scope="module")
def server(repositories: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(repositories, tmp_path_factory.mktemp("log") / "server.log") as running:
        yield running
    assert running.process.returncode == 0


@pytest.fixture(scope="module")
def expected(rq_compile: Command, engines: dict[str, Path]) -> Callable[[str, str], tuple[str, list[int]]]:
    """Text and tokens of ``rq-compile generate``, at most twelve tokens."""

    def run(model: str, prompt: str) -> tuple[str, list[int]]:
        command = ("generate", engines[model], "--prompt", prompt, "--max-tokens", 12, "--threads", 1, "--json")
        said = json.loads(succeed(rq_compile(*command)).stdout)
        return said["text"], said["tokens"]

    return run


@pytest.mark.parametrize("model", ["model", "native"])
def test_generate_gives_the_text_and_tokens_of_rq_compile_generate(server: Server, expected: Callable, model: str) -> None:
    for prompt in PROMPTS[:3]:
        assert server.generate(model, text_input=prompt, max_tokens=12) == expected(model, prompt)


def test_streams_give_the_same_token_by_token(server: Server, expected: Callable) -> None:
    text, tokens = expected("native", PROMPTS[0])
    request = {"text_input": PROMPTS[0], "max_tokens": 12}
    lines = server.post("native", "generate_stream", **request, stream=True).splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert [token for event in events for token in np.ravel(event["token_ids"]).tolist()] == tokens
    streamed = server.stream("native", **request)
    assert [token for _, ids in streamed for token in ids] == tokens
    assert "".join(piece for piece, _ in streamed) == "".join(event["text_output"] for event in events) == text


def test_token_ids_are_taken_instead_of_text(server: Server, engines: dict[str, Path]) -> None:
    tokens = list(Engine.load(engines["native"], threads=1).generate([5, 9, 17, 3], 6))
    assert server.generate("native", input_ids=[5, 9, 17, 3], max_tokens=6)[1] == tokens


def test_eight_clients_at_once_get_what_each_would_get_alone(server: Server, expected: Callable) -> None:
    def ask(number: int) -> list[int]:
        request = {"text_input": PROMPTS[number], "max_tokens": 12}
        if number % 2:
            return [token for _, ids in server.stream("native", **request) for token in ids]
        return server.generate("native", **request)[1]

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, range(8)))
    assert answers == [expected("native", prompt)[1] for prompt in PROMPTS]


def test_a_short_request_does_not_wait_for_long_ones_until_they_take_all_places_and_gets_one_that_is_cancelled(
    server: Server, engines: dict[str, Path]
) -> None:
    tokens = list(Engine.load(engines["native"], threads=1).generate([5, 9], 12, stop=False))
    inputs = tensors({"input_ids": [7], "max_tokens": LONGEST - 1, "stream": True})
    responses: queue.Queue = queue.Queue()
    with grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: responses.put(error or result))
        running: set[str] = set()
        for number in range(SLOTS):
            if number == SLOTS - 1:
                assert server.generate(ENDLESS, input_ids=[5, 9], max_tokens=12)[1] == tokens
            client.async_stream_infer(ENDLESS, inputs, request_id=str(number))
            while str(number) not in running:
                running.add(responses.get(timeout=60).get_response().id)
        client.stop_stream(cancel_requests=True)
    with pytest.raises(InferenceServerException, match="cancelled"):
        list(pieces(responses))
    assert server.generate(ENDLESS, input_ids=[5, 9], max_tokens=12)[1] == tokens


def test_tokens_are_chosen_as_the_engine_does(server: Server, chat_engine: Path) -> None:
    engine = rq.load(chat_engine, threads=1)
    ids = engine.tokenizer.encode("Once").ids
    options = {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2}
    penalties = {"presence_penalty": 0.4, "frequency_penalty": 0.2, "seed": 5, "ignore_eos": True, "stop_token_ids": [77]}
    for given in ({"seed": 3}, {"temperature": 0}, options | {"seed": 1}, options | penalties):
        params = sampling_params(given, engine.manifest.sampling.model_dump())
        tokens = list(engine.generate(ids, 12, sampling=params))
        wanted = (engine.tokenizer.decode(tokens), tokens)
        assert server.generate(TALK, text_input="Once", max_tokens=12, **given) == wanted
    stop = "".join(engine.stream("Once", 12, sampling=GREEDY))[5:8]
    text = "".join(engine.stream("Once", 12, sampling=replace(GREEDY, stop=(stop,))))
    assert server.generate(TALK, text_input="Once", max_tokens=12, temperature=0, stop=[stop, "never"])[0] == text
    for verb in ("generate", "generate_stream"):
        said = server.post(TALK, verb, text_input="Once", max_tokens=2, temperature=0, logit_bias='{"9": 100}', logprobs=2)
        answer = json.loads(said.removeprefix("data: "))
        choices = list(engine.choices(ids, 2, sampling=replace(GREEDY, logit_bias={9: 100}, logprobs=2)))
        for one, choice in zip(json.loads(answer["logprobs"]), choices, strict=True):
            assert one["token"] == choice.token == 9
            assert one["logprob"] == pytest.approx(choice.logprob, abs=1e-4)
            assert [token for token, _ in one["top"]] == [token for token, _ in choice.top]


def test_conversations(server: Server, chat_engine: Path) -> None:
    wanted = "".join(rq.load(chat_engine, threads=1).chat(SAID, 12, sampling=GREEDY))
    assert server.generate(TALK, messages=json.dumps(SAID), max_tokens=12, temperature=0)[0] == wanted


@pytest.mark.parametrize(
    ("model", "request_", "word"),
    [
        (TALK, {"text_input": "a", "temperature": -1}, "temperature is -1"),
        (TALK, {"text_input": "a", "top_p": 2}, "top_p is 2"),
        (TALK, {"text_input": "a", "stop": [""]}, "stop is"),
        (TALK, {"text_input": "a", "logit_bias": "{"}, "logit_bias is not JSON"),
        (TALK, {"text_input": "a", "logit_bias": '{"500": 1}'}, "names the token 500"),
        (TALK, {"messages": "Hello"}, "messages is not a conversation"),
        (TALK, {"messages": "[]"}, "messages is not a conversation"),
        (TALK, {"messages": '[{"role": "robot"}]'}, "unknown role robot"),
        (TALK, {"text_input": "a", "messages": json.dumps(SAID)}, "or messages"),
        ("native", {"messages": json.dumps(SAID)}, "has no chat template"),
    ],
)
def test_bad_parameters_get_an_error(server: Server, model: str, request_: dict[str, Any], word: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as failure:
        server.post(model, "generate", **({"max_tokens": 4} | request_))
    assert failure.value.code == 400
    assert word in failure.value.read().decode()


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        ({}, "either text_input or input_ids"),
        ({"text_input": "a", "input_ids": [1]}, "either text_input or input_ids"),
        ({"text_input": ""}, "empty"),
        ({"input_ids": [1, 10**6]}, "outside the vocabulary"),
        ({"input_ids": [-1]}, "outside the vocabulary"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens is 0"),
        ({"text_input": "a", "max_tokens": 2**30}, "exceed the longest sequence"),
        ({"text_input": ["a", "b"]}, "proper shape"),
        ({"text_input": "a", "max_tokens": "many"}, "integer"),
    ],
)
def test_a_bad_request_gets_an_error_and_the_server_lives(
    server: Server, expected: Callable, request_: dict[str, Any], word: str
) -> None:
    for verb in ("generate", "generate_stream"):
        with pytest.raises(urllib.error.HTTPError) as failure:
            server.post("native", verb, **({"max_tokens": 4} | request_))
        assert 400 <= failure.value.code < 600
        assert word in failure.value.read().decode()
    assert server.generate("native", text_input=PROMPTS[0], max_tokens=12) == expected("native", PROMPTS[0])


def test_bytes_that_are_no_text_and_a_request_without_stream_are_refused(server: Server, expected: Callable) -> None:
    with pytest.raises(InferenceServerException, match="not UTF-8"):
        server.stream("native", text_input=b"\xff\xfe")
    # Triton's plain inference route does not support several responses.
    text = http.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"a"], np.object_))
    with http.InferenceServerClient(server.http) as client, pytest.raises(InferenceServerException, match="decoupled"):
        client.infer("native", [text])
    assert server.generate("native", text_input=PROMPTS[0], max_tokens=12) == expected("native", PROMPTS[0])


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


def test_a_folder_that_was_moved_is_served_after_a_restart(repositories: list[Path], expected: Callable, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(repositories[1], first)
    for folder in (first, second):
        with Server([folder], tmp_path / "server.log") as server:
            assert server.generate("native", text_input=PROMPTS[0], max_tokens=12) == expected("native", PROMPTS[0])
        assert server.process.returncode == 0
        if folder == first:
            first.rename(second)


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


class Client:
    """A client that keeps the cache and generates with one request per step."""

    def __init__(self, server: Server, engine: Path) -> None:
        self.client = grpc.InferenceServerClient(server.grpc)
        self.cache = Engine.load(engine, threads=1).manifest.cache

    def generate(self, prompt: list[int], count: int, multiple: int = 1) -> list[int]:
        """``multiple``: prompts and caches are padded on the left to a multiple of so many tokens, so that requests of different
        lengths have equal shapes."""
        past = {tensor.past: tensor.empty(1) for tensor in self.cache}
        ids = np.array([[0] * (-len(prompt) % multiple) + prompt], np.int64)
        length, columns = len(prompt), 0
        tokens: list[int] = []
        while len(tokens) < count:
            mask = np.zeros((1, columns + ids.shape[1]), np.int64)
            mask[:, -length:] = 1
            positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, columns:]
            feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            result = self.client.infer(STAND_IN, [self.tensor(*feed) for feed in (feeds | past).items()])
            columns = -(-length // multiple) * multiple
            past = {tensor.past: ending(result.as_numpy(tensor.present), columns) for tensor in self.cache}
            tokens.append(int(result.as_numpy("logits")[0, -1].argmax()))
            ids, length = np.array([tokens[-1:]], np.int64), length + 1
        return tokens

    @staticmethod
    def tensor(name: str, array: np.ndarray) -> grpc.InferInput:
        made = grpc.InferInput(name, array.shape, "INT64" if array.dtype == np.int64 else "FP32")
        made.set_data_from_numpy(array)
        return made


def ending(keys: np.ndarray, columns: int) -> np.ndarray:
    """The last ``columns`` tokens of keys or values ``[1, heads, tokens, dimension]``, with zeros before them."""
    kept = keys[:, :, max(0, keys.shape[2] - columns) :]
    return np.pad(kept, ((0, 0), (0, 0), (columns - kept.shape[2], 0), (0, 0)))


@pytest.mark.parametrize(("lengths", "multiple"), [([5] * 8, 1), ([3, 5, 8, 9, 11, 12, 14, 15], 16)], ids=["equal", "padded"])
def test_onnxruntime_config_serves_clients_that_hold_the_cache_and_batches_their_equal_shapes(
    server: Server, engines: dict[str, Path], lengths: list[int], multiple: int
) -> None:
    engine = Engine.load(engines["native"], threads=1)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, engine.manifest.vocabulary, length).tolist() for length in lengths]
    before = statistics(server)
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda prompt: Client(server, engines["native"]).generate(prompt, 8, multiple), prompts))
    assert answers == [list(engine.generate(prompt, 8, stop=False)) for prompt in prompts]
    after = statistics(server)
    assert after["execution_count"] - before["execution_count"] < after["inference_count"] - before["inference_count"] == 64
    assert {batch["batch_size"] for batch in after["batch_stats"]} - {1}


def statistics(server: Server) -> dict[str, Any]:
    return http.InferenceServerClient(server.http).get_inference_statistics(STAND_IN)["model_stats"][0]
