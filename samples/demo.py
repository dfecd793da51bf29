"""From the sample checkpoint to a running engine, with the command line; ``make demo`` runs it.

Every command is printed before it runs and can be typed by hand (``source .venv/bin/activate`` first). The commands write to
``demo/``. The summary at the end comes from the JSON that ``evaluate`` and ``bench`` print.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

from rq_compile.engine.library import MPI_LIBRARY, library_path
from rq_compile.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo")
MODEL = Path("samples/olmoe")
TEXTS = Path("samples/text")
CALIBRATION_KINDS = ("scripture", "hacker", "dictionary")
HELD_OUT_KINDS = (*CALIBRATION_KINDS, "satire")  # the calibration has not seen the last kind
PROMPT = "And the LORD said unto"

PATHS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
RANKS = 2
LIMIT = 60  # seconds of the processes of several ranks, which would wait forever for one that is lost

seconds: dict[str, float] = {}


def run(command: list[str], name: str, *, into: Path | None = None, limit: float | None = None) -> str:
    """Run ``command`` and return its output. The output is shown, or redirected to ``into`` if that is given. ``name``: in the
    list of times."""
    print(f"\n$ {shlex.join(command)}" + (f" > {into}" if into else ""), flush=True)
    executable = shutil.which(command[0], path=PATHS)
    if executable is None:
        sys.exit(f"{command[0]} is not installed; run make demo, which installs it into .venv")
    start = monotonic()
    finished = subprocess.run(
        [executable, *command[1:]], stdout=subprocess.PIPE, text=True, timeout=limit, env=os.environ | {"PATH": PATHS}
    )
    if finished.returncode:
        sys.exit(finished.returncode)
    seconds[name] = monotonic() - start
    if into:
        into.write_text(finished.stdout)
    else:
        print(finished.stdout, end="", flush=True)
    return finished.stdout


def rq_compile(*arguments: str | Path, into: Path | None = None) -> str:
    command = ["rq-compile", *map(str, arguments)]
    return run(command, command[1] if command[1] != str(MODEL) else "compile", into=into)


def texts(kinds: tuple[str, ...], part: str) -> list[str | Path]:
    return [argument for kind in kinds for argument in ("--text", TEXTS / f"{kind}.{part}.txt")]


def balance(evaluation: dict[str, Any], word: str, field: str) -> None:
    """Print one row per layer and one column per text, before -> after."""
    print(f"\n{word:<12}" + "".join(f"{text['name'].split('.')[0]:<17}" for text in evaluation["texts"]).rstrip())
    for position, layer in enumerate(evaluation["texts"][0]["layers"]):
        found = [text["layers"][position] for text in evaluation["texts"]]
        cells = [f"{each[f'{field}_before']:.3f} -> {each[f'{field}_after']:.3f}" for each in found]
        print(f"layer {layer['index']:<6}" + "".join(f"{cell:<17}" for cell in cells).rstrip())


def planned_bytes(plan: dict[str, Any]) -> int:
    return sum(layer["predicted"]["bytes_after"] for layer in plan["layers"])


def has_ranks() -> bool:
    try:
        library_path(MPI_LIBRARY)
    except UserError:
        return False
    return shutil.which("mpiexec", path=PATHS) is not None


def ranks(calibration: Path) -> None:
    """The same model on two processes, which exchange rows in every MoE layer. Skipped where MPI or its ops are missing."""
    if not has_ranks():
        print("\nNo engine of several ranks: it needs MPI and make mpi-ops (docs/ranks.md).")
        return
    plan, engine = OUT / "ranks.json", OUT / "ranks"
    run(["rq-compile", "plan", str(calibration), "--ranks", str(RANKS), "-q", "-o", str(plan)], "plan for ranks")
    run(["rq-compile", str(MODEL), "--plan", str(plan), "-q", "-o", str(engine)], "compile for ranks")
    prompts = ["--prompt", PROMPT, "--prompt", "A kind of"]
    run(
        ["mpiexec", "-n", str(RANKS), "rq-compile", "generate", str(engine), *prompts, "--max-tokens", "8"],
        "generate on ranks",
        limit=LIMIT,
    )
    layers = json.loads(plan.read_text())["layers"]
    busiest = [mean(layer["predicted"][f"rank_imbalance_{when}"] for layer in layers) for when in ("before", "after")]
    print(f"\nrows of the busiest of {RANKS} ranks over the mean, planned: {busiest[0]:.3f} -> {busiest[1]:.3f}")


def summary(plan: dict[str, Any], evaluation: dict[str, Any], bench: dict[str, Any], generated: str) -> None:
    print("\nSummary on held-out text, before -> after the plan. No text of the kind of satire was used for calibration.")
    balance(evaluation, "LIS", "lis")
    balance(evaluation, "strict LIS", "strict_lis")
    print("\nperplexity    transformers    engine     change    top-1 agreement")
    for text in [*evaluation["texts"], evaluation["total"]]:
        theirs, ours = text["perplexity_reference"], text["perplexity_engine"]
        change, agreement = 100 * (ours / theirs - 1), 100 * text["agreement"]
        print(f"{text['name'].split('.')[0]:<14}{theirs:12.3f}{ours:10.3f}{change:+9.2f} %{agreement:17.2f} %")
    before, planned, kept = evaluation["expert_bytes_before"], planned_bytes(plan), evaluation["expert_bytes_after"]
    print(f"\nexpert bytes  {before} -> {planned} in all slots ({planned / before:.3f});")
    print(f"              {kept} in this engine ({kept / before:.3f}), which stores identical copies once")
    theirs, ours = bench["other"], bench["engine"]
    print(f"\ntokens/s      transformers    engine      ratio    (batch 1, {os.cpu_count()} cores; not due to the balance)")
    for what, count in (("prefill", bench["prompt_tokens"]), ("decode", bench["new_tokens"])):
        print(f"{f'{what} ({count})':<14}{theirs[what]:12.1f}{ours[what]:10.1f}{bench[f'ratio_{what}']:11.2f}")
    print(f"\ngenerated     {generated.strip()}")
    print("\nseconds       " + ", ".join(f"{step} {time:.0f}" for step, time in seconds.items()))


def main() -> None:
    os.chdir(ROOT)
    OUT.mkdir(exist_ok=True)
    calibration, plan, engine = OUT / "calibration.json", OUT / "plan.json", OUT / "olmoe.onnx"
    evaluation, bench = OUT / "evaluation.json", OUT / "bench.json"

    # All of the text, in sequences as the model was trained on.
    lengths = ("--sequence-length", "256", "--tokens", "100000")
    rq_compile("calibrate", MODEL, *texts(CALIBRATION_KINDS, "calibration"), *lengths, "-o", calibration)
    # On one device, a balanced load saves time in the lowering `batched` alone. The native engine below shows the balance; its
    # speed comes from its kernels and formats.
    rq_compile("plan", calibration, "--target", "batched", "-o", plan)
    rq_compile(MODEL, "--plan", plan, "-o", engine)
    rq_compile("inspect", engine, "--verify")
    rq_compile("evaluate", engine, "--reference", MODEL, *texts(HELD_OUT_KINDS, "heldout"), "--json", into=evaluation)
    rq_compile("bench", engine, "--against", MODEL, "--json", into=bench)
    generated = rq_compile("generate", engine, "--prompt", PROMPT, "--max-tokens", "32")
    planned, evaluated, measured = (json.loads(file.read_text()) for file in (plan, evaluation, bench))
    ranks(calibration)
    summary(planned, evaluated, measured, generated)


if __name__ == "__main__":
    main()
