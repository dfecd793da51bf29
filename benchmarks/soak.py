"""Many clients of a Triton package for a long time: does every answer stay right, and the memory flat?

A real tritonserver serves two models, each from its own folder. Clients of random habits ask one or the other: they take answers
as a whole or token by token, cancel over gRPC, close the connection in the middle, send requests that make no sense, prompts of
many scripts, and prompts of hundreds of tokens. Every answer that is not refused or abandoned must be the one that the same
request got before, whoever shares its steps. Where two tokens are equally likely but for rounding, an answer may go on with
either. Each such pair of answers is proved: at its first difference, the log probabilities of the two tokens must be so near
that padding can change which one is greater, see ``NEAR`` ("near_ties", "widest_tie"). Half-way the second model is unloaded
while it streams, and loaded again. At the end the server is killed (SIGKILL), which all of its processes must follow, and
started again.

    python benchmarks/soak.py --model DIR --model DIR --minutes 20 --clients 8 32

DIR is what ``package --for triton`` wrote. The row is written to benchmarks/results/soak.json. "growth_mb" is the growth of the
resident memory (PSS) of the server's processes from the end of the warm-up, the first fifth of the time, to the end.
"""

import argparse
import http.client
import json
import queue
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import numpy as np
import tritonclient.grpc as grpc
from processes_memory import family, memory
from provenance import processor, provenance
from tokenizers import Tokenizer
from triton_server import Server, pieces, read_config, tensors, write_config

from rq_compile.standalone.text import open_tokenizer

RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
TEXTS = (
    "And the LORD said unto",
    "hacker",
    "Δεν υπάρχει",
    "数学は",
    "🙂🙃 emoji",
    "e\u0301 and \u200d joined",
    "\x00\x01 control",
    "a" * 700,
    "The quick brown fox. " * 40,
)
# Requests that make no sense, each with a word of the answer.
NONSENSE: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "either text_input or input_ids"),
    ({"text_input": ""}, "empty"),
    ({"input_ids": [10**7]}, "outside the vocabulary"),
    ({"text_input": "a", "max_tokens": 0}, "max_tokens"),
    ({"text_input": "a", "max_tokens": 10**8}, "exceed the longest sequence"),
    ({"text_input": ["a", "b"]}, "shape"),
)
TOKENS = (4, 40)
LONGEST = 2048
# How near the log probabilities of equally likely tokens are, by the engine's activation bits: twice what padding changes them by
# at most. Where activations are rounded to 8 bits, a difference in the last bit can move one of them by a whole step.
NEAR = {32: 2e-4, 16: 2e-4, 8: 0.1}
# A model that is unloaded while it streams must end its streams within this many seconds.
UNLOADED_WITHIN = 15.0


@dataclass
class Soak:
    """What the clients share. ``known``: the answer to each request that was ever completed."""

    server: Server
    models: Sequence[str]
    stop: threading.Event = field(default_factory=threading.Event)
    known: dict[tuple[str, str, int], list[int]] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    others: dict[tuple[str, str, int], list[int]] = field(default_factory=dict)  # another answer to the same request
    faults: list[str] = field(default_factory=list)
    resting: set[str] = field(default_factory=set)  # models that may be away

    def client(self, number: int) -> None:
        chance = random.Random(number)
        habits: tuple[Callable[[random.Random, str], None], ...] = (
            *(self.whole, self.whole, self.streamed, self.streamed, self.over_grpc),
            *(self.leaves, self.cancels, self.asks_nonsense),
        )
        while not self.stop.is_set():
            habit, model = chance.choice(habits), chance.choice(self.models)
            away = model in self.resting
            try:
                habit(chance, model)
                self.done[habit.__name__] += 1
            except Exception as error:  # every error is a fault, unless the model is away
                if not away and model not in self.resting and not self.stop.is_set():
                    self.faults.append(f"{habit.__name__} of {model}: {type(error).__name__} {error}"[:300])

    def request(self, chance: random.Random) -> dict[str, Any]:
        return {"text_input": chance.choice(TEXTS), "max_tokens": chance.randrange(*TOKENS)}

    def check(self, model: str, request: dict[str, Any], tokens: list[int]) -> None:
        key = model, request["text_input"], request["max_tokens"]
        if self.known.setdefault(key, tokens) != tokens:
            self.others[key] = tokens

    def apart(self, key: tuple[str, str, int], tokenizer: Tokenizer) -> float:
        """How far apart the two answers' tokens are at their first difference, in log probabilities."""
        model, text, _ = key
        one, other = self.known[key], self.others[key]
        at = next(place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        prompt = [*tokenizer.encode(text).ids, *one[:at]]
        said = json.loads(self.server.post(model, "generate", input_ids=prompt, max_tokens=1, logprobs=20))
        (choice,) = json.loads(said["logprobs"])
        likely = dict(choice["top"])
        return abs(likely.get(one[at], -np.inf) - likely.get(other[at], np.inf))

    def whole(self, chance: random.Random, model: str) -> None:
        request = self.request(chance)
        self.check(model, request, self.server.generate(model, **request)[1])

    def streamed(self, chance: random.Random, model: str) -> None:
        request = self.request(chance)
        lines = self.server.post(model, "generate_stream", **request, stream=True).splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        self.check(model, request, [token for event in events for token in np.ravel(event["token_ids"]).tolist()])

    def over_grpc(self, chance: random.Random, model: str) -> None:
        request = self.request(chance)
        self.check(model, request, [token for _, ids in self.server.stream(model, **request) for token in ids])

    def leaves(self, chance: random.Random, model: str) -> None:
        """Close the connection after a few tokens."""
        host, port = self.server.http.split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=240)
        body = json.dumps(self.request(chance) | {"max_tokens": 200, "stream": True})
        connection.request("POST", f"/v2/models/{model}/generate_stream", body)
        response = connection.getresponse()
        for _ in range(chance.randrange(6)):
            response.readline()
        connection.close()

    def cancels(self, chance: random.Random, model: str) -> None:
        responses: queue.Queue = queue.Queue()
        with grpc.InferenceServerClient(self.server.grpc) as client:
            client.start_stream(lambda result, error: responses.put(error or result))
            client.async_stream_infer(model, tensors(self.request(chance) | {"max_tokens": 200, "stream": True}))
            if chance.random() < 0.7:
                responses.get(timeout=240)
            client.stop_stream(cancel_requests=True)

    def asks_nonsense(self, chance: random.Random, model: str) -> None:
        request, word = chance.choice(NONSENSE)
        host, port = self.server.http.split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=240)
        connection.request("POST", f"/v2/models/{model}/generate", json.dumps({"max_tokens": 4} | request))
        response = connection.getresponse()
        said = response.read().decode()
        if model not in self.resting and (not 400 <= response.status < 500 or word not in said):
            raise ValueError(f"{request} got {response.status} {said[:200]}")

    def unload_while_streaming(self, model: str) -> float:
        """Seconds until a long stream of the model, which is unloaded, ends with an error."""
        responses: queue.Queue = queue.Queue()
        self.resting.add(model)
        with grpc.InferenceServerClient(self.server.grpc) as client, grpc.InferenceServerClient(self.server.grpc) as other:
            client.start_stream(lambda result, error: responses.put(error or result))
            client.async_stream_infer(model, tensors({"text_input": TEXTS[0], "max_tokens": 1500, "stream": True}))
            responses.get(timeout=240)
            begun = time.monotonic()
            other.unload_model(model)
            try:
                for _ in pieces(responses):
                    pass
                self.faults.append(f"a stream of {model}, which was unloaded, ended without an error")
            except Exception as error:
                if "unloaded" not in str(error):
                    self.faults.append(f"a stream of {model}, which was unloaded, ended with {error}")
            took = time.monotonic() - begun
            if took > UNLOADED_WITHIN:
                self.faults.append(f"a stream of {model}, which was unloaded, ended after {took:.0f} s")
            while other.is_model_ready(model):
                time.sleep(0.1)
            other.load_model(model)
        self.resting.discard(model)
        return took


def runs(process: int) -> bool:
    """Whether a process exists and did not end: one that nobody waited for stays in the table (state Z)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_gone(members: list[int], within: float) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not any(map(runs, members)):
            return True
        time.sleep(0.1)
    return False


def endless(package: Path, repository: Path) -> list[str]:
    """Copy a package so that its answers are as long as asked for. Returns the names of its models."""
    shutil.copytree(package, repository)
    models = [folder for folder in repository.iterdir() if folder.is_dir()]
    for model in models:
        config = read_config(model)
        config.parameters["max_sequence_length"].string_value = str(LONGEST)
        write_config(config, model)
        for manifest in (path.with_suffix(".json") for path in (model / "1").glob("*.onnx")):
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "end_of_text": []}))
    return [model.name for model in models]


def soak(folders: Sequence[Path], seconds: float, clients: Sequence[int], scratch: Path) -> dict[str, Any]:
    """Run it; ``clients``: the numbers of clients in turn, each for its share of the time. Returns the row, with all faults."""
    repositories = [scratch / f"repository{number}" for number in range(len(folders))]
    models = [model for folder, repository in zip(folders, repositories, strict=True) for model in endless(folder, repository)]
    sizes: list[tuple[float, int]] = []
    with Server(repositories, scratch / "server.log") as server:
        state = Soak(server, models)
        begun = time.monotonic()
        unloaded = None
        for share, count in enumerate(clients, 1):
            state.stop.clear()
            threads = [threading.Thread(target=state.client, args=(number,)) for number in range(count)]
            for thread in threads:
                thread.start()
            while time.monotonic() < begun + seconds * share / len(clients):
                time.sleep(min(1.0, seconds / 20))
                sizes.append((time.monotonic() - begun, memory(server.process.pid)))
                if unloaded is None and sizes[-1][0] > seconds / 2:
                    unloaded = state.unload_while_streaming(models[-1])
            state.stop.set()
            for thread in threads:
                thread.join(180)
                if thread.is_alive():
                    state.faults.append("a client waits for an answer that does not come")
        members = family(server.process.pid)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(60)
        if not all_gone(members, within=90):
            state.faults.append("a process of the server outlives it")
    with Server(repositories, scratch / "again.log") as server:
        state.server = server
        for model, text, most in list(state.known)[:20]:
            request = {"text_input": text, "max_tokens": most}
            state.check(model, request, server.generate(model, **request)[1])
        tokenizers = {path.parents[1].name: open_tokenizer(path) for path in scratch.glob("repository*/*/1/*.tokenizer.json")}
        ties = {key: state.apart(key, tokenizers[key[0]]) for key in state.others}
    engines = {path.parents[1].name: path.with_suffix(".json") for path in scratch.glob("repository*/*/1/*.onnx")}
    near = {model: NEAR[json.loads(manifest.read_text())["activation_bits"]] for model, manifest in engines.items()}
    state.faults += [f"{key} got two answers, {apart:.2g} apart" for key, apart in ties.items() if apart > near[key[0]]]
    # On a machine that is too busy, there are few sizes.
    warm = [size for when, size in sizes if seconds / 5 < when] or [size for _, size in sizes]
    tenth = max(1, len(warm) // 10)
    return {
        "seconds": round(seconds),
        "clients": list(clients),
        "models": models,
        "requests": dict(state.done),
        "different_requests": len(state.known),
        "near_ties": len(ties),
        "widest_tie": max(ties.values(), default=None),
        "faults": len(state.faults),
        "first_faults": state.faults[:5],
        "unloaded_after_s": None if unloaded is None else round(unloaded, 1),
        "memory_mb": round(max(size for _, size in sizes) / 1e6),
        "growth_mb": round((np.median(warm[-tenth:]) - np.median(warm[:tenth])) / 1e6, 1),
        "memory_every_tenth_mb": [
            round(float(np.median(part)) / 1e6) for part in np.array_split([s for _, s in sizes], min(10, len(sizes)))
        ],
        "processor": processor(),
        **provenance("rq-compile", "onnxruntime"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", required=True, help="folder of a Triton package")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        row = soak(args.model, 60 * args.minutes, args.clients, Path(scratch))
    print(json.dumps(row, indent=1, ensure_ascii=False))
    args.output.write_text(json.dumps([row], indent=1) + "\n")
    sys.exit(1 if row["faults"] else 0)


if __name__ == "__main__":
    main()
