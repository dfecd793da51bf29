"""Changes to a plan as tables."""

from __future__ import annotations

from rich.console import RenderableType

from rq_compile.cli.tables.layout import facts, megabytes, table
from rq_compile.planning.replan import Change, Changes
from rq_compile.planning.schema import Plan


def changes_tables(changes: Changes, plan: Plan) -> list[RenderableType]:
    """What ``changes`` move, and how ``plan``, the changed plan, balances the new loads."""
    head = facts("changes", moved=f"{changes.count} of {changes.slots} slots, {megabytes(changes.bytes_moved)}")
    for remark in plan.remarks:
        head.add_row("remark", remark)
    busiest = "rank" if plan.ranks > 1 else "slot"
    made = table(f"load of the busiest {busiest} over the mean", "layer", "new loads", "changes", "bytes", "what moves")
    made.columns[-1].justify = "left"
    for layer in changes.layers:
        made.add_row(
            str(layer.index),
            f"{layer.imbalance_before:.3f} -> {layer.imbalance_after:.3f}",
            str(len(layer.changes)),
            megabytes(sum(change.bytes for change in layer.changes)),
            ", ".join(moves_of(change, plan.ranks) for change in layer.changes) or "-",
        )
    return [head, made]


def moves_of(change: Change, ranks: int) -> str:
    where = f"slot {change.slot}" + (f" of rank {change.rank}" if ranks > 1 else "")
    return f"{where}: {'new' if change.before is None else change.before} -> {change.now}"
