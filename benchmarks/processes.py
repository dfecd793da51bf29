"""How much faster are several processes? One core each, layers in the shape of a published model, random weights.

    python benchmarks/processes.py --command calibrate --processes 1 2 --folder /scratch
    python benchmarks/processes.py --command compile --only-make --folder /scratch
    python benchmarks/processes.py --command compile --processes 1 2 --rounds 3 --folder /scratch

The numbers of processes take turns. "seconds" is the wall time of the whole command in every round, from the start of `torchrun`
(or of the single process) to its end; "start_s" is the median of that of the same command with `--dry-run`, which opens the
checkpoint and computes nothing, in the same rounds. Each process, also a single one, is bound to a core of its own, because a
process has threads that read, write and hash beside the one that computes.
"speedup" compares the seconds after the start, in medians, with the row of one process. `calibrate` runs layer
by layer with GPTQ, also in one process. `compile` rounds every expert to int4 with GPTQ; "weights_s" is the time for its weights
after the export of the graph, during which other processes round experts already. `--only-make` makes the input of the
measurement: the checkpoint, the text and the plan. A row is written to benchmarks/results/processes.json, and replaces a row of
the same kind.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from calibration import ROOT, SHAPES, checkpoint, environment, text

from rq_compile.architectures.model import Model

RESULTS = ROOT / "benchmarks" / "results" / "processes.json"
LENGTH = ("--sequence-length", "512", "--batch-size", "2")
# A single process also runs layer by layer, as several processes do.
LAYER_BY_LAYER = """
import sys
from rq_compile.calibration import calibrate as module
from rq_compile.cli.main import run
module.choose_way = lambda *_, **__: module.Way(False, True, "layer by layer")
sys.argv[0] = "rq-compile"
run()
"""


# The first argument is Python.
ON_ITS_CORE = 'exec taskset -c "$LOCAL_RANK" "$0" -m rq_compile "$@"'


def command(processes: int, *arguments: str) -> list[str]:
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--no-python"]
        return [*start, "sh", "-c", ON_ITS_CORE, sys.executable, *arguments]
    return ["taskset", "-c", "0", sys.executable, "-c", LAYER_BY_LAYER, *arguments]


def after_start(row: dict[str, Any]) -> float:
    return median(row["seconds"]) - row["start_s"]


def seconds(processes: int, *arguments: str) -> tuple[float, str]:
    """The seconds that the command took, and its output."""
    began = perf_counter()
    found = subprocess.run(
        command(processes, *arguments), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise SystemExit(found.stderr)
    return perf_counter() - began, found.stderr


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--command", choices=("calibrate", "compile"), default="calibrate")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", choices=SHAPES, default="OLMoE-1B-7B")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, help="number of experts, if fewer than the model has")
    parser.add_argument("--layers", type=int, default=1, help="number of layers")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True, help="folder where checkpoints are made and kept")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="file to which the row is written")
    parser.add_argument("--only-make", action="store_true", help="make the input of the measurement, and measure nothing")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint(given.shape, given.experts, given.folder, given.layers)
    texts = given.folder / f"{given.tokens}.txt"
    calibration, plan = (given.folder / f"{path.name}.{name}.json" for name in ("calibration", "plan"))
    output = given.folder / ("measured.json" if given.command == "calibrate" else "engine.onnx")
    calibrating = ["calibrate", str(path), "--text", str(texts), *LENGTH]
    if not texts.exists():
        texts.write_text(text(Model.open(path), given.tokens)["text"])
    if given.only_make:
        seconds(1, *calibrating, "-o", str(calibration))
        seconds(1, "plan", str(calibration), "--memory", "0.27", "-o", str(plan))
        return
    run = calibrating if given.command == "calibrate" else [str(path), "--plan", str(plan), "--threads", "1"]
    run += ["-o", str(output)]
    rounds: dict[int, list[tuple[float, str]]] = {processes: [] for processes in sorted(given.processes)}
    starts: dict[int, list[float]] = {processes: [] for processes in rounds}
    for _ in range(given.rounds):
        for processes, taken in rounds.items():
            taken.append(seconds(processes, *run))
            starts[processes].append(seconds(processes, *run, "--dry-run")[0])
    for processes, taken in rounds.items():
        weights = [float(match[1]) for _, said in taken if (match := re.search(r"of weights in (.*) s,", said))]
        row: dict[str, Any] = {
            "command": given.command,
            "shape": given.shape,
            "layers": given.layers,
            "experts": given.experts,
            "tokens": given.tokens,
            "processes": processes,
            "seconds": [round(each, 2) for each, _ in taken],
            "start_s": round(median(starts[processes]), 2),
            **({"weights_s": weights} if weights else {}),
            **environment(),
            "threads": 1,
        }
        keep(row, given.output)
        print(json.dumps(row, indent=1))


def keep(row: dict[str, Any], output: Path) -> None:
    """Write the row in place of one of the same kind, with the speedup over that of one process."""
    known = json.loads(output.read_text()) if output.exists() else []
    key = ("command", "shape", "layers", "experts", "tokens", "processes")
    single = [other for other in known if [other[name] for name in key] == [*(row[name] for name in key[:-1]), 1]]
    if single and row["processes"] > 1:
        row["speedup"] = round(after_start(single[0]) / after_start(row), 2)
    kept = [other for other in known if [other[name] for name in key] != [row[name] for name in key]]
    output.write_text(json.dumps([*kept, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
