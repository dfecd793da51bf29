"""The busiest of 4, 8 and 64 ranks: rows counted on recorded loads, and predicted times. Nothing is timed.

The cases and plans are those of rank_cases.py. ``rank_imbalance_counted`` is the busiest rank over the mean in steps that the
plans have not seen: batches of 4 held-out sequences of 256 tokens of the sample models, and 512 tokens of the OLMoE-shaped
routers. ``counted`` and ``predicted`` are ratios to ``none``: of the rows of the busiest rank, and of the time that the cost
model predicts, with the exchange.

    python benchmarks/rank_counts.py -o benchmarks/results/rank_counts.json             # calibrates the samples first
    python benchmarks/rank_counts.py --prepared /tmp/ranks -o benchmarks/results/rank_counts.json   # where ranks.py prepared them
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provenance import provenance
from rank_cases import CASES, Case, busiest, case_named, imbalance_of, plans_of, read_case, rows_of_ranks

RANKS = (4, 8, 64)
TOKENS = 512  # of the step whose time is predicted


def rows(name: str, case: Case) -> Iterator[dict[str, Any]]:
    experts = case.calibration.layers[0].geometry.experts
    for ranks in (ranks for ranks in RANKS if ranks <= experts):
        first: tuple[float, float] | None = None
        for policy, plan in plans_of(case.calibration, ranks, TOKENS):
            time = sum(layer.predicted.step_time_after for layer in plan.layers)
            counted = busiest(rows_of_ranks(plan, case.recorded))
            first = first or (counted, time)
            yield {
                "case": name,
                "ranks": ranks,
                "policy": policy,
                "memory": round(plan.bytes_after / plan.bytes_before, 3),
                "slots": [len(layer.slots) for layer in plan.layers],
                "rank_imbalance_planned": round(imbalance_of(plan), 3),
                "rank_imbalance_counted": round(counted, 3),
                "counted": round(counted / first[0], 3),
                "predicted": round(time / first[1], 3),
                **provenance("numpy"),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, metavar="CASE")
    parser.add_argument("--prepared", type=Path, help="the folder of ranks.py prepare")
    parser.add_argument("-o", "--output", type=Path, help="file for the rows, JSON; rows of other cases in it are kept")
    arguments = parser.parse_args()
    known = json.loads(arguments.output.read_text()) if arguments.output and arguments.output.exists() else []
    made = [row for row in known if row["case"] not in arguments.cases]
    for name in arguments.cases:
        case = read_case(arguments.prepared / name) if arguments.prepared else case_named(name)
        for row in rows(name, case):
            print({key: row[key] for key in row if key not in ("commit", "date", "numpy")}, flush=True)
            made.append(row)
        if arguments.output:
            arguments.output.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
