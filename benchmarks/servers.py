"""The servers that serving.py compares: what each serves, how it is started, and what its clients ask."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming_clients import Asking

from rq_compile.cli.main import main as rq_compile

ROOT = Path(__file__).parents[1]
LONGEST = 512  # tokens of a prompt with its answer
THREADS = 2
PORT = 8123


@dataclass(frozen=True)
class Programs:
    """Those that are not part of this project. ``before``: the commit of the server "before"."""

    tritonserver: Path
    llama_server: Path
    llama_python: Path
    before: str | None


class Server:
    """One kind of server. ``asking``: how its clients ask. ``ready``: a path that answers with 200 once the server is ready."""

    asking: Asking
    ready = "/health"

    def make(self, folder: Path, checkpoint: Path, programs: Programs) -> None:
        """Write what the server serves to ``folder``, which has the engine of ``checkpoint`` as ``model.onnx``."""

    def command(self, folder: Path, slots: int, programs: Programs) -> list[Any]:
        """What starts the server."""
        raise NotImplementedError

    def versions(self, programs: Programs) -> dict[str, str]:
        """Those that ``provenance`` does not know."""
        return {}


class Triton(Server):
    asking = Asking(
        "/v2/models/model/generate_stream", lambda ids, most: {"input_ids": ids, "max_tokens": most, "stream": True}, "token_ids"
    )
    ready = "/v2/health/ready"
    repository = "rq-compile"

    def make(self, folder: Path, checkpoint: Path, programs: Programs) -> None:
        repository = folder / self.repository
        if repository.exists():
            shutil.rmtree(repository)
        words = ["package", folder / "model.onnx", "--for", "triton", "--threads", THREADS, "-q", "-o", repository]
        rq_compile([str(word) for word in words], standalone_mode=False)
        manifest = repository / "model" / "1" / "model.json"
        # Answers then have as many tokens as were asked for.
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"end_of_text": []}))

    def command(self, folder: Path, slots: int, programs: Programs) -> list[Any]:
        repository = folder / self.repository
        config = repository / "model" / "config.pbtxt"
        text = config.read_text()
        for key, value in (("concurrent_requests", slots), ("max_sequence_length", LONGEST)):
            text, found = re.subn(rf'(key: "{key}"\s+value \{{\s+string_value: )"\d+"', rf'\1"{value}"', text)
            assert found == 1, key
        config.write_text(text)
        ports = ["--http-port", PORT, "--grpc-port", PORT + 1, "--allow-metrics=false", "--http-thread-count=40"]
        return [programs.tritonserver, "--model-repository", repository, *ports]


class TritonBefore(Triton):
    repository = "before"

    def make(self, folder: Path, checkpoint: Path, programs: Programs) -> None:
        super().make(folder, checkpoint, programs)
        for file, source in (("model.py", "packaging/triton_files"), ("decoding.py", "standalone")):
            if programs.before is not None:
                command = ["git", "-C", str(ROOT), "show", f"{programs.before}:rq_compile/{source}/{file}"]
                there = folder / self.repository / "model" / "1" / file
                there.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)


class RqCompileServe(Server):
    asking = Asking(
        "/v1/completions",
        lambda ids, most: {
            "prompt": ids,
            "max_tokens": most,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        },
        "token_ids",
    )

    def command(self, folder: Path, slots: int, programs: Programs) -> list[Any]:
        sizes = ["--slots", slots, "--max-length", LONGEST, "--threads", THREADS, "--no-enable-prefix-caching"]
        return [sys.executable, "-m", "rq_compile", "serve", folder / "model.onnx", "--port", PORT, *sizes]


class LlamaCpp(Server):
    """With its defaults, apart from threads, slots and lengths, and without caches of prompts, because no prompt comes again."""

    asking = Asking(
        "/completion",
        lambda ids, most: {
            "prompt": ids,
            "n_predict": most,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "stream": True,
            "cache_prompt": False,
        },
        "tokens",
    )

    def make(self, folder: Path, checkpoint: Path, programs: Programs) -> None:
        script = ROOT / "benchmarks" / "llama_cpp" / "gguf_checkpoint.py"
        words = [programs.llama_python, script, checkpoint, "--format", "Q8_0", "-o", folder / "model.gguf"]
        subprocess.run([str(word) for word in words], check=True)

    def command(self, folder: Path, slots: int, programs: Programs) -> list[Any]:
        sizes = ["--parallel", slots, "--ctx-size", slots * LONGEST, "--threads", THREADS, "--threads-batch", THREADS]
        options = ["--cont-batching", "--cache-ram", 0]
        return [programs.llama_server, "--model", folder / "model.gguf", "--port", PORT, *sizes, *options]

    def versions(self, programs: Programs) -> dict[str, str]:
        said = subprocess.run([programs.llama_server, "--version"], capture_output=True, text=True, check=True)
        return {"llama.cpp": (said.stdout + said.stderr).partition("version: ")[2].splitlines()[0]}


SERVERS: dict[str, Server] = {
    "rq-compile": Triton(),
    "before": TritonBefore(),
    "rq-compile serve": RqCompileServe(),
    "llama.cpp": LlamaCpp(),
}
