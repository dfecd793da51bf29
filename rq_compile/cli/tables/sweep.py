"""Plans for many budgets as tables."""

from __future__ import annotations

from rich.console import RenderableType

from rq_compile.cli.tables.layout import counts, facts, megabytes, table
from rq_compile.planning.sweep import Sweep


def sweep_tables(sweep: Sweep) -> list[RenderableType]:
    head = facts(
        "sweep",
        model=f"{sweep.model} ({sweep.model_type}, {sweep.fingerprint[:12]})",
        policy=sweep.policy,
        target=f"{sweep.target}, {sweep.ranks} rank{'s' if sweep.ranks > 1 else ''}",
        experts=f"{megabytes(sweep.bytes_before)} in the checkpoint",
    )
    for remark in sweep.remarks:
        head.add_row("remark", remark)
    whole = sweep.of_engines
    columns = ("engine", "MB", "error (nats)") if whole else ("memory", "MB", "error")
    made = table(
        "one plan for each budget; means over the layers, times as multiples of those without a plan",
        *(*columns, "LIS", "time of a step", "of a token", "replicas", "slots", *(["non-expert modules"] if whole else [])),
    )
    for point in sweep.points:
        made.add_row(
            point.budget_told,
            f"{point.bytes_taken / 1e6:.2f}",
            f"{point.error_within:.2e}",
            f"{point.lis:.3f}",
            *("-" if time is None else f"{time:.3f}" for time in (point.step_time, point.token_time)),
            str(point.replicas),
            counts(point.slots),
            *([counts(point.modules)] if whole else []),
        )
    return [head, made]
