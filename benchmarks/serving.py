"""How many tokens a second does a server give to 1, 8 and 32 clients, and how long does each of them wait?

The models, with int8 experts and dense part: two samples (samples/olmoe is "sample", samples/top1 is smaller), and three layers
of OLMoE-1B-7B with random weights (1.5 GB, "large"). The servers, on the same threads and with as many slots as there are
clients, at least 8:

rq-compile        the Triton package in a real tritonserver
before            the same engine and server with the model.py of ``--before COMMIT``: a thread and a cache for each request
rq-compile serve  the same engine behind OpenAI's API
llama.cpp         its own server (benchmarks/llama_cpp/build.py --server) with Q8_0 weights of the same checkpoint; it does not
                  load samples/olmoe, which has fewer heads for keys than for queries

Each client sends one request after another, with a random prompt of 16 to 256 tokens and an answer of 16 to 128, and reads it as
a stream over HTTP. After ``--warm-up`` seconds, and once every client has had its first answer, all tokens that come within
``--seconds`` are counted: the first requests of all clients come at once, and wait for each other. "first_ms" is the time from a
request to its first token, "between_ms" that between two tokens of an answer; tokens that come in one event count once.
"memory_mb" is the largest proportional set size (PSS) of the server's processes: mapped weights count, too. "server_cpus" and
"clients_cpus" are the processors that the server and the clients took on average.

    python benchmarks/llama_cpp/build.py --server
    python benchmarks/serving.py --folder /scratch --before 3820b76 --llama-python /venvs/llama_cpp/bin/python --only-make
    python benchmarks/serving.py --folder /scratch --model sample --server rq-compile --clients 1 8 32

A row is written to benchmarks/results/serving.json, and replaces a row of the same model, server and number of clients. With
``--table``, the rows are printed as in docs/serving.md.
"""

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import numpy as np
from generated_checkpoint import OLMOE_1B_7B, generate
from plans import plan_of
from processes_memory import family, memory
from provenance import processor, provenance
from servers import PORT, SERVERS, THREADS, Programs
from streaming_clients import Client, Times, run

from rq_compile.architectures.model import Model
from rq_compile.lowerings import Native
from rq_compile.planning.schema import Slot
from rq_compile.targets.onnxruntime import compile_engine

RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
LARGE = replace(OLMOE_1B_7B, layers=3)
SAMPLES = {"sample": ROOT / "samples" / "olmoe", "top1": ROOT / "samples" / "top1"}
MODELS = (*SAMPLES, "large")
PROMPTS, ANSWERS = (16, 257), (16, 129)  # tokens
SLOTS = 8
Row = dict[str, Any]


def make(name: str, folder: Path, servers: list[str], programs: Programs) -> None:
    """The model's engine, and what each of ``servers`` serves."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = SAMPLES.get(name, folder / "checkpoint")
    if not checkpoint.exists():
        generate(LARGE, checkpoint)
    if not (folder / "model.onnx").exists():
        opened = Model.open(checkpoint)
        plan = plan_of(opened, lambda layer: [Slot(expert=expert, format="int8") for expert in range(layer.geometry.experts)])
        plan = plan.model_copy(update={"quantizer": "nearest"})
        compile_engine(opened, plan, folder / "model.onnx", Native(activation_bits=8, dense_format="int8"))
    for server in servers:
        SERVERS[server].make(folder, checkpoint, programs)


def requests(number: int, vocabulary: int) -> Iterator[tuple[list[int], int]]:
    """What client ``number`` asks: random prompts, each with the length of its answer."""
    random = np.random.default_rng([7, number])
    while True:
        yield random.integers(1, vocabulary, random.integers(*PROMPTS)).tolist(), int(random.integers(*ANSWERS))


@contextmanager
def serving(name: str, folder: Path, slots: int, programs: Programs) -> Iterator[subprocess.Popen]:
    """The running server."""
    server, path = SERVERS[name], folder / f"{name}.log"
    words = [str(word) for word in server.command(folder, slots, programs)]
    with path.open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        while not answers(server.ready):
            if process.poll() is not None:
                raise SystemExit(path.read_text()[-2000:])
            time.sleep(0.2)
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its children so far."""
    ticks = 0
    for member in family(pid):
        fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def answers(path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def measured(name: str, server: str, clients: int, settings: argparse.Namespace) -> Row:
    folder, slots = settings.folder / name, max(SLOTS, clients)
    vocabulary = json.loads((folder / "model.json").read_text())["vocabulary"]
    times, stop, failures = Times(), threading.Event(), list[str]()
    asking = [Client(PORT, SERVERS[server].asking, requests(number, vocabulary), times) for number in range(clients)]
    with serving(server, folder, slots, settings.programs) as process:
        thread = threading.Thread(target=run, args=(asking, stop, failures))
        thread.start()
        time.sleep(settings.warm_up)
        while not failures and min(client.answered for client in asking) == 0:
            time.sleep(0.1)
        begun, used = time.perf_counter(), (cpu_seconds(process.pid), time.process_time())
        most = 0
        while (ended := time.perf_counter()) < begun + settings.seconds:
            most = max(most, memory(process.pid))
            time.sleep(1)
        server_cpus = (cpu_seconds(process.pid) - used[0]) / (ended - begun)
        clients_cpus = (time.process_time() - used[1]) / (ended - begun)
        stop.set()
        thread.join(60)
    if failures:
        raise SystemExit(f"{len(failures)} requests failed: {failures[0]}")
    first, between = ([1e3 * took for when, took in noted if begun <= when <= ended] for noted in (times.first, times.between))
    return {
        "model": name,
        "server": server,
        "clients": clients,
        "tokens_per_s": round(sum(begun <= when <= ended for when in times.tokens) / (ended - begun), 1),
        "first_ms": round(median(first), 1),
        "first_p99_ms": round(float(np.percentile(first, 99)), 1),
        "between_ms": round(median(between), 2),
        "between_p99_ms": round(float(np.percentile(between, 99)), 2),
        "memory_mb": round(most / 1e6),
        "server_cpus": round(server_cpus, 2),
        "clients_cpus": round(clients_cpus, 2),
        "slots": slots,
        "threads": THREADS,
        "seconds": round(ended - begun, 1),
        "requests": len(first),
        "processor": processor(),
        "cpus": len(os.sched_getaffinity(0)),
        **provenance("rq-compile", "onnxruntime", "numpy"),
        **SERVERS[server].versions(settings.programs),
    }


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of the table in docs/serving.md."""
    order = {name: number for number, name in enumerate((*MODELS, *SERVERS))}
    yield "| model | clients | server | tokens/s | first token, ms | between tokens, ms | memory, MB |"
    yield "|---|---:|---|---:|---:|---:|---:|"
    for row in sorted(rows, key=lambda row: (order[row["model"]], row["clients"], order[row["server"]])):
        first = f"{row['first_ms']:.0f} ({row['first_p99_ms']:.0f})"
        between = f"{row['between_ms']:.1f} ({row['between_p99_ms']:.0f})"
        speed, memory_mb = f"{row['tokens_per_s']:,.0f}", f"{row['memory_mb']:,}"
        cells = map(str, (row["model"], row["clients"], row["server"], speed, first, between, memory_mb))
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder for models and repositories")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--server", choices=SERVERS, nargs="+", default=[*SERVERS])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--warm-up", type=float, default=5)
    parser.add_argument("--before", help="commit whose model.py the server 'before' runs")
    parser.add_argument("--only-make", action="store_true", help="make models and repositories, and measure nothing")
    parser.add_argument("--table", action="store_true", help="print the table of docs/serving.md, and measure nothing")
    parser.add_argument("--tritonserver", type=Path, default=ROOT / ".venv-triton" / "bin" / "tritonserver")
    parser.add_argument("--llama-server", type=Path, default=ROOT / "build" / "llama_cpp" / "server" / "bin" / "llama-server")
    parser.add_argument("--llama-python", type=Path, default=sys.executable, help="has benchmarks/runtimes/llama_cpp.txt")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    settings = parser.parse_args()
    if settings.table:
        print("\n".join(table(json.loads(settings.output.read_text()))))
        return
    if settings.folder is None:
        parser.error("give --folder")
    settings.programs = Programs(settings.tritonserver, settings.llama_server, settings.llama_python, settings.before)
    for name in settings.model:
        if settings.only_make:
            make(name, settings.folder / name, settings.server, settings.programs)
            continue
        for clients in settings.clients:
            for server in settings.server:
                row = measured(name, server, clients, settings)
                print(json.dumps(row), flush=True)
                known = json.loads(settings.output.read_text()) if settings.output.exists() else []
                key = ("model", "server", "clients")
                kept = [other for other in known if [other[part] for part in key] != [row[part] for part in key]]
                settings.output.write_text(json.dumps([*kept, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
