"""A sweep for the model of an engine."""

from pathlib import Path

from rq_compile.calibration.schema import Calibration
from rq_compile.engine.manifest import Manifest
from rq_compile.files import read_document
from rq_compile.planning.sweep import Sweep, make_sweep


def sweep_of(manifest: Manifest, calibration: Path) -> Sweep:
    plan = manifest.plan
    measured = read_document(Calibration, calibration)
    return make_sweep(measured, policy="optimal", budgets=None, ranks=plan.ranks, target=plan.target)
