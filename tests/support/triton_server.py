"""Shared by the tests of the Triton package: engines, configs, and a running ``tritonserver``."""

import json
import os
import queue
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from click.testing import Result
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

Command = Callable[..., Result]
# The server of nvidia-pytriton, in an environment with the packages that a packaged model.py needs.
SERVER = Path(os.environ.get("TRITONSERVER", Path(__file__).parents[2] / ".venv-triton" / "bin" / "tritonserver"))
needs_server = pytest.mark.skipif(
    not SERVER.is_file(), reason=f"no {SERVER}: run make .venv-triton/bin/tritonserver or set TRITONSERVER"
)


def succeed(result: Result) -> Result:
    assert result.exit_code == 0, result.stderr
    return result


def compile_native(rq_compile: Command, stages: Path, checkpoint: Path, folder: Path) -> Path:
    """An engine that needs the op library, from the checkpoint that ``stages`` calibrated."""
    plan, path = folder / "plan.json", folder / "native.onnx"
    succeed(rq_compile("plan", stages / "calibration.json", "--target", "cpu", "--memory", 0.6, "-o", plan, "-q"))
    succeed(rq_compile(checkpoint, "--plan", plan, "-o", path, "-q"))
    return path


def read_config(model: Path) -> ModelConfig:
    return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())


def as_json(config: ModelConfig) -> str:
    return json_format.MessageToJson(config, preserving_proto_field_name=True)


def write_config(config: ModelConfig, model: Path) -> None:
    (model / "config.pbtxt").write_text(text_format.MessageToString(config))


class Server:
    """A running ``tritonserver``; ``http`` and ``grpc`` are its addresses."""

    def __init__(self, repositories: list[Path], log: Path) -> None:
        ports = free_ports(2)
        self.http, self.grpc = (f"127.0.0.1:{port}" for port in ports)
        words = [str(SERVER), *(f"--model-repository={path}" for path in repositories), "--model-control-mode=explicit"]
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

    def post(self, model: str, verb: str, **request: Any) -> str:
        url = f"http://{self.http}/v2/models/{model}/{verb}"
        return urllib.request.urlopen(url, json.dumps(request).encode(), timeout=240).read().decode()

    def generate(self, model: str, **request: Any) -> tuple[str, list[int]]:
        answer = json.loads(self.post(model, "generate", **request))
        return answer["text_output"], np.ravel(answer["token_ids"]).tolist()

    def stream(self, model: str, **request: Any) -> list[tuple[str, list[int]]]:
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


def tensors(request: dict[str, Any]) -> list[grpc.InferInput]:
    kinds: dict[str, tuple[str, Any]] = {
        "text_input": ("BYTES", np.object_),
        "input_ids": ("INT64", np.int64),
        "max_tokens": ("INT32", np.int32),
    }
    inputs = []
    for name, value in request.items():
        kind, dtype = kinds.get(name, ("BOOL", np.bool_))
        array: np.ndarray = np.atleast_1d(np.array(value, dtype))
        inputs.append(grpc.InferInput(name, array.shape, kind))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def pieces(responses: queue.Queue) -> Iterator[tuple[str, list[int]]]:
    while True:
        result = responses.get(timeout=240)
        if isinstance(result, Exception):
            raise result
        if result.get_response().parameters["triton_final_response"].bool_param:
            return
        yield result.as_numpy("text_output")[0].decode(), result.as_numpy("token_ids").tolist()
