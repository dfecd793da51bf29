"""Checks that an evaluation, a benchmark or a sweep belongs to the engine of a report."""

from pathlib import Path

from rq_compile.engine.manifest import Manifest
from rq_compile.errors import UserError
from rq_compile.evaluation.schema import Bench, Evaluation
from rq_compile.files import sha256
from rq_compile.planning.sweep import Sweep


def check_evaluation(engine: Path, manifest: Manifest, evaluation: Evaluation, path: Path) -> None:
    """
    Raises:
        UserError: the evaluation at ``path`` names another engine or model, or has other layers or bytes than this engine.
    """
    plan = manifest.plan
    layers = [(layer.name, layer.index) for layer in plan.layers] if manifest.slot_offsets else []
    for told, ours, theirs in (
        ("", engine.name, evaluation.engine),
        ("the model ", plan.model, evaluation.reference),
        ("layers ", layers, [(layer.name, layer.index) for layer in evaluation.total.layers]),
        ("expert bytes ", plan.bytes_before, evaluation.expert_bytes_before),
        ("expert bytes ", manifest.expert_bytes, evaluation.expert_bytes_after),
    ):
        if ours != theirs:
            raise UserError(
                f"{path} is an evaluation of {told}{theirs}, not of {told}{ours}; make it with "
                f"rq-compile evaluate {engine.name} --reference MODEL --text FILE --json",
                2,
            )


def check_bench(engine: Path, manifest: Manifest, bench: Bench, path: Path) -> None:
    """
    Raises:
        UserError: the benchmark at ``path`` timed another engine, or an engine of the same name with other weights.
    """
    other = bench.engine.name if bench.engine.name != engine.name else None
    if bench.weights_sha256 not in (None, manifest.weights.sha256):
        other = other or f"an earlier {engine.name}"
    if other:
        raise UserError(
            f"{path} is a benchmark of {other}, not of {engine.name}; make it with "
            f"rq-compile bench {engine.name} --against MODEL --json",
            2,
        )


def check_sweep(engine: Path, manifest: Manifest, sweep: Sweep, path: Path) -> None:
    """
    Raises:
        UserError: the sweep at ``path`` is of another checkpoint, or for another target or number of ranks.
    """
    plan = manifest.plan
    for told, ours, theirs in (
        ("the checkpoint ", plan.fingerprint[:12], sweep.fingerprint[:12]),
        ("the target ", plan.target, sweep.target),
        ("ranks: ", plan.ranks, sweep.ranks),
    ):
        if ours != theirs:
            raise UserError(
                f"{path} is a sweep of {told}{theirs}, and {engine.name} is of {told}{ours}; make it with rq-compile plan "
                f"CALIBRATION --sweep --target {plan.target} --ranks {plan.ranks}",
                2,
            )


def check_calibration(engine: Path, manifest: Manifest, path: Path) -> None:
    """Check that the engine's plan was made from the calibration at ``path``.

    Raises:
        UserError: it was made from another one.
    """
    if sha256(path) != manifest.plan.calibration_sha256:
        raise UserError(f"{path} is not the calibration that {engine.name} was planned with; give that one, or leave it out", 2)
