"""Compare all kernels with float64, on the GPU of this machine. Needs torch and Triton, but no network.

    python plugins/kernels/check_on_gpu.py
    python plugins/kernels/check_on_gpu.py --quick                          only the cases of CI

Each number is the largest error divided by the allowed rounding of the result; up to 1 is correct. The exit status is 1 if any
number is larger. With TRITON_INTERPRET=1 and --device cpu, the same runs in Triton's interpreter.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="leave the large layers out")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="default: a different one each time")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; on a CPU set TRITON_INTERPRET=1 and give --device cpu --quick")
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("Triton runs kernels on a CPU only with TRITON_INTERPRET=1 in the environment; set it")
    import triton
    from rq_kernels import cases

    chosen = [case for case in cases.CASES + ([] if args.quick else cases.LARGE) if args.only in case.name]
    if not chosen:
        parser.error(f"no case's name contains '{args.only}'; leave --only out to see the names")
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else "Triton's interpreter"
    print(f"{where}, torch {torch.__version__}, Triton {triton.__version__}, seed {args.seed}")
    wrong = 0
    for case in chosen:
        try:
            errors = cases.worst(case, args.seed, args.device)
        except Exception as error:  # one kernel that does not compile must not hide the others
            print(f"FAILED  {case.name}: {type(error).__name__}: {error}", flush=True)
            wrong += 1
            continue
        right = all(error <= 1 for error in errors.values())
        wrong += not right
        numbers = "  ".join(f"{stage} {error:.2f}" for stage, error in errors.items())
        print(f"{'ok    ' if right else 'FAILED'}  {case.name:40} {numbers}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} cases are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
