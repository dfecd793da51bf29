"""Checkpoints, calibrations, plans, engines and results as tables for people."""

from rq_compile.cli.tables.calibration import calibration_tables
from rq_compile.cli.tables.changes import changes_tables
from rq_compile.cli.tables.checkpoint import checkpoint_tables
from rq_compile.cli.tables.engine import engine_tables, estimate_tables, package_tables
from rq_compile.cli.tables.evaluation import bench_tables, evaluation_tables
from rq_compile.cli.tables.layout import facts, megabytes, table
from rq_compile.cli.tables.plan import plan_tables
from rq_compile.cli.tables.sweep import sweep_tables

__all__ = [
    "bench_tables",
    "calibration_tables",
    "changes_tables",
    "checkpoint_tables",
    "engine_tables",
    "estimate_tables",
    "evaluation_tables",
    "facts",
    "megabytes",
    "package_tables",
    "plan_tables",
    "sweep_tables",
    "table",
]
