"""Compile the kernels ahead of time: PTX and cubin for each SM, and kernels.json, which describes how each is launched.

    python plugins/kernels/build.py -o build/kernels                    all of them; takes minutes
    python plugins/kernels/build.py -o build/kernels --sm 90 --only "up_gated_*_int4_*" "dispatch_*"

Needs Triton but no GPU. The same sources and the same Triton give the same bytes.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

SMS = (80, 89, 90, 100, 120)
# Shared memory that one program may use, in bytes: the CUDA programming guide's table of compute capabilities.
SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
SPILLED = 64  # bytes that a thread may spill; if it spills more, the tile is too large
# PTX 8.7 is the oldest version that supports SM 120, and came with CUDA 12.8. A cubin loads in every driver of its ptxas's major
# version. The ptxas that Triton 3.9 uses below SM 90, of CUDA 12.9, builds all cubins here.
PTX = 87
PTX_DRIVER = "570.26"
CUBIN_DRIVER = {"12": "525.60.13", "13": "580.65.06"}
SM_100_DRIVER = "570.26"  # the first driver that supports SM 100 and 120


def compile_variant(name: str, sm: int, output: Path) -> dict[str, Any]:
    """Write ``sm{sm}/{name}.cubin`` and ``.ptx``. Returns the build's entry in kernels.json.

    Raises:
        RuntimeError: the kernel needs something that an ahead-of-time launch cannot provide, more shared memory than the SM has,
            or too many registers.
    """
    import triton
    from rq_kernels.variants import ALIGNED, variants
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = next(variant for variant in variants() if variant.name == name)
    arguments = variant.kernel.arg_names
    aligned = [i for i, a in enumerate(arguments) if variant.parameters.get(a, "").startswith("*") or a in ALIGNED]
    source = ASTSource(
        fn=variant.kernel,
        signature={argument: variant.parameters.get(argument, "constexpr") for argument in arguments},
        constexprs=variant.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "ptx_version": PTX, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    metadata = built.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise RuntimeError(f"{name} for SM {sm} wants scratch memory of Triton's; change the kernel")
    if metadata.shared > SHARED[sm]:
        raise RuntimeError(f"{name} wants {metadata.shared} bytes of SM {sm}'s {SHARED[sm]} of shared memory; use smaller tiles")
    files = {}
    for kind, data in (("cubin", built.asm["cubin"]), ("ptx", built.asm["ptx"].encode())):
        file = output / f"sm{sm}" / f"{name}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        files[kind] = {"file": str(file.relative_to(output)), "sha256": hashlib.sha256(data).hexdigest()}
    # Architecture-specific instructions (sm_90a and so on) bind PTX to that architecture; other PTX runs on every later GPU.
    portable = re.search(r"^\.target sm_\d+$", built.asm["ptx"], re.MULTILINE) is not None
    used = _resources(output / files["cubin"]["file"])
    if used["spilled"] > SPILLED:
        raise RuntimeError(f"{name} spills {used['spilled']} bytes of registers a thread on SM {sm}; use smaller tiles")
    return {"sm": sm, "entry": metadata.name, "shared": metadata.shared, **used, "portable_ptx": portable, **files}


def _resources(cubin: Path) -> dict[str, int]:
    """Registers of a thread, and its stack in bytes. These kernels have no arrays, so the stack holds only spilled registers."""
    from triton import knobs

    report = subprocess.check_output([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin], text=True)
    return {key: int(re.search(rf"{word}:(\d+)", report)[1]) for key, word in (("registers", "REG"), ("spilled", "STACK"))}  # type: ignore[index]


def describe(variant: Any, builds: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of a variant in kernels.json."""
    from rq_kernels.variants import ALIGNED

    return {
        "name": variant.name,
        "parameters": [{"name": name, "type": kind} for name, kind in variant.parameters.items()],
        "hidden_parameters": ["global_scratch", "profile_scratch"],
        "divisible_by_16": [name for name in variant.parameters if name in ALIGNED],
        "constants": variant.constants,
        "grid": list(variant.grid),
        "warps": variant.warps,
        "builds": builds,
    }


def _prepare(cache: str) -> None:
    """Prepare every process before Triton is imported: an empty cache, no paths of this machine, one ptxas for all SMs."""
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DISABLE_LINE_INFO": "1"}
    from triton import knobs

    os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = knobs.nvidia.ptxas.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the kernels and kernels.json")
    parser.add_argument("--sm", type=int, nargs="+", choices=SMS, default=SMS, help="default: all")
    parser.add_argument("--only", nargs="+", help="names of kernels, or patterns with *; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        _prepare(cache)
        import triton
        from rq_kernels import tiles
        from rq_kernels.variants import variants
        from triton import knobs

        chosen = [v for v in variants() if not args.only or any(fnmatchcase(v.name, pattern) for pattern in args.only)]
        if not chosen:
            parser.error(f"no kernel is called {' or '.join(args.only)}; the names are in rq_kernels/variants.py")
        # Slow kernels first, so that no process is left alone with one at the end.
        jobs = sorted(((v.name, sm) for v in chosen for sm in args.sm), key=lambda job: ("prefill" not in job[0], job))
        with ProcessPoolExecutor(args.jobs, initializer=_prepare, initargs=(cache,)) as pool:
            started = {job: pool.submit(compile_variant, *job, args.output) for job in jobs}
            for done, (job, future) in enumerate(started.items(), 1):
                future.result()
                print(f"{done}/{len(jobs)} {job[0]} sm{job[1]}", flush=True)
        kernels = [describe(v, [started[v.name, sm].result() for sm in args.sm]) for v in chosen]
        toolkit = {"triton": triton.__version__, "ptxas": knobs.nvidia.ptxas.version, "ptx": f"{PTX // 10}.{PTX % 10}"}
        drivers = {"ptx": PTX_DRIVER, "cubin": CUBIN_DRIVER[toolkit["ptxas"].split(".")[0]], "sm_100_and_later": SM_100_DRIVER}
    document = {"version": 1, **toolkit, "linux_driver_at_least": drivers, "tiles": tiles.rule(), "kernels": kernels}
    (args.output / "kernels.json").write_text(json.dumps(document, indent=1) + "\n")
    report(kernels)


def report(kernels: list[dict[str, Any]]) -> None:
    """Registers of a thread / KiB of shared memory."""
    sms = [build["sm"] for build in kernels[0]["builds"]]
    print(f"{'':34}" + "".join(f"{f'sm{sm}':>16}" for sm in sms))
    for kernel in kernels:
        cells = [f"{b['registers']} / {b['shared'] / 1024:.0f}{' spills' * bool(b['spilled'])}" for b in kernel["builds"]]
        print(f"{kernel['name']:34}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
