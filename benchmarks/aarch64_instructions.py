"""Instructions per multiply-add of the kernels for 64-bit ARM, counted in qemu. No speed: no ARM processor was measured.

A product of 4 panels (64 weight rows) is run with 512 and with 1024 columns, one instruction at a time, and the difference of the
executed instructions is divided by the difference of the multiply-adds. int8 and int4 have int8 activations and blocks of 128.

    python benchmarks/aarch64_instructions.py        # needs g++-aarch64-linux-gnu and qemu-user (Debian 12); a minute

The rows are written to benchmarks/results/aarch64_instructions.json.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from provenance import provenance
from rich.console import Console

from rq_compile.cli.tables import table

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "plugins" / "onnxruntime" / "src"
FLAGS = ("-std=c++17", "-O3", "-static", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-I", SOURCES)
SETS = {"plain": "armv8-a", "neon": "armv8-a", "neon_dotprod": "armv8.2-a+dotprod", "neon_i8mm": "armv8.2-a+dotprod+i8mm"}
STORAGES = ("fp32", "fp16", "bf16", "int8", "int4")  # in the order of Storage in kernels.h
ROWS = (1, 4, 16)
PANELS, COLUMNS = 4, (512, 1024)


def built(folder: Path, compiler: str) -> Path:
    parts = [Path(__file__).with_suffix(".cc"), *(SOURCES / f"{name}.cc" for name in ("kernels", "self_check"))]
    options = dict.fromkeys(parts, "armv8-a") | {SOURCES / f"kernels_{name}.cc": march for name, march in SETS.items()}
    objects = []
    for source, march in options.items():
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([compiler, *FLAGS, f"-march={march}", "-DRQ_ARM64", "-c", source, "-o", objects[-1]], check=True)
    program = folder / "product"
    subprocess.run([compiler, "-static", *objects, "-o", program], check=True)
    return program


def instructions(program: Path, *arguments: object) -> int:
    """Number of instructions that one run executes: with -singlestep, qemu logs each as a block of its own."""
    command = ["qemu-aarch64", "-cpu", "max", "-singlestep", "-d", "exec,nochain", "-D", "/dev/stdout", str(program)]
    with subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        count = sum(line.startswith(b"Trace") for line in run.stdout)
    if run.returncode:
        raise SystemExit(f"{program} {arguments} ended with status {run.returncode}")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "aarch64_instructions.json")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        program = built(Path(folder), arguments.compiler)
        for name in SETS:
            for number, storage in enumerate(STORAGES):
                for count in ROWS:
                    short, long = (instructions(program, name, number, count, columns) for columns in COLUMNS)
                    products = count * PANELS * 16 * (COLUMNS[1] - COLUMNS[0])
                    rows.append({"set": name, "storage": storage, "rows": count, "instructions": (long - short) / products})
    version = subprocess.run([arguments.compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    document = {"rows": rows, "compiler": version} | provenance()
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    made = table("instructions per multiply-add, counted in qemu", "set", *(f"{s}, {r} rows" for s in STORAGES for r in ROWS))
    for name in SETS:
        made.add_row(name, *(f"{row['instructions']:.3f}" for row in rows if row["set"] == name))
    Console(width=200).print(made)


if __name__ == "__main__":
    main()
