"""An engine, its estimate and its package as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType

from rq_compile.cli.screen import duration
from rq_compile.cli.tables.layout import facts, megabytes, table
from rq_compile.cli.tables.plan import plan_tables
from rq_compile.engine.manifest import Manifest
from rq_compile.packaging.package import Package

if TYPE_CHECKING:
    from rq_compile.estimates import Estimate


def estimate_tables(estimate: Estimate) -> list[RenderableType]:
    values: dict[str, object] = {
        "to write": megabytes(estimate.output_bytes),
        "temporary": megabytes(estimate.temporary_bytes),
        "memory": f"about {megabytes(estimate.memory_bytes)}",
        "time": f"roughly {duration(estimate.seconds)} on {estimate.cores} cores",
    }
    head = facts("estimate (no weight was read)", **values)
    for remark in estimate.remarks:
        head.add_row("remark", remark)
    made = table("files", "", "bytes")
    for name, size in estimate.outputs.items():
        made.add_row(name, f"{size}")
    return [head, made]


def engine_tables(manifest: Manifest) -> list[RenderableType]:
    of_ranks = [file for rank in manifest.ranks for file in (rank.graph, rank.weights)]
    files = [*(of_ranks or [manifest.graph]), manifest.weights, *([manifest.tokenizer] if manifest.tokenizer else [])]
    library = "any ONNX Runtime" if manifest.op_library is None else f"op library rq.moe {manifest.op_library}"
    head = facts(
        "engine",
        made_by=manifest.tool,
        files=", ".join(f"{file.name} ({megabytes(file.bytes)})" for file in files),
        runs_in=f"{library}, {manifest.provider}; lowering {manifest.lowering}, {manifest.activation_bits}-bit activations, "
        f"opset {manifest.opset}",
        weights=f"{megabytes(manifest.expert_bytes)} of experts, {megabytes(manifest.dense_bytes)} of the rest",
        dense="as planned" if manifest.plan.dense else manifest.dense_format,
        replaced=", ".join(f"{reason}: {count}" for reason, count in manifest.replaced.items()) or "nothing",
        remarks="; ".join(manifest.remarks) or "none",
    )
    return [head, *plan_tables(manifest.plan)]


def package_tables(package: Package) -> list[RenderableType]:
    head = facts(f"package for {package.destination}", folder=package.folder, files=", ".join(package.files))
    for command in package.run:
        head.add_row("run", command)
    for remark in package.remarks:
        head.add_row("remark", remark)
    return [head]
