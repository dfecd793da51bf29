"""Calibrations, plans, engines and results as tables a person can read."""

from __future__ import annotations

from collections import Counter

from rich.console import RenderableType
from rich.table import Table

from rq_compile.calibration.schema import Calibration, LayerCalibration
from rq_compile.evaluation.schema import Bench, Evaluation, TextEvaluation
from rq_compile.planning.schema import LayerPlan, Plan
from rq_compile.quantization.formats import FORMATS
from rq_compile.targets.manifest import Manifest


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, column in enumerate(columns):
        made.add_column(column, justify="left" if position == 0 else "right", no_wrap=True)
    return made


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def members(experts: list[int], limit: int = 6) -> str:
    shown = " ".join(map(str, experts[:limit])) + (" ..." if len(experts) > limit else "")
    return f"{len(experts)} ({shown})" if experts else "-"


def facts(title: str, **values: object) -> Table:
    made = table(title, "", "")
    made.show_header = False
    made.columns[1].justify = "left"
    made.columns[1].no_wrap = False
    for name, value in values.items():
        made.add_row(name.replace("_", " "), str(value))
    return made


def calibration_tables(calibration: Calibration) -> list[RenderableType]:
    texts = ", ".join(f"{text.name} ({text.tokens} tokens)" for text in calibration.texts)
    head = facts(
        "calibration",
        model=f"{calibration.model} ({calibration.model_type}, {calibration.dtype})",
        texts=texts,
        tokens=f"{calibration.tokens} (and {calibration.padding_tokens} of padding, not counted)",
    )
    formats = [format for format in FORMATS if format in calibration.layers[0].error]
    errors = [f"error at {format}" for format in formats]
    made = table("layers", "layer", "experts", "top-k", "LIS", "heavy hitter", *errors, "unreached", "estimated")
    for layer in calibration.layers:
        load = layer.load
        made.add_row(
            str(layer.index),
            str(layer.geometry.experts),
            str(layer.geometry.top_k),
            f"{lis(layer):.3f}",
            f"{load.index(max(load))} ({max(load)})",
            *(f"{sum(layer.error[format]):.2e}" for format in formats),
            members([expert for expert, count in enumerate(load) if count == 0]),
            members(layer.estimated),
        )
    return [head, made]


def lis(layer: LayerCalibration) -> float:
    return max(1.0, layer.geometry.experts * max(layer.load) / max(1, sum(layer.load)))


def formats_of(layer: LayerPlan) -> str:
    counts = Counter(slot.format for slot in layer.slots)
    return " ".join(f"{format}:{counts[format]}" for format in FORMATS if counts[format])


def plan_tables(plan: Plan) -> list[RenderableType]:
    ratio = plan.bytes_after / max(1, plan.bytes_before)
    options = " ".join(f"{name}={value}" for name, value in plan.options.items())
    head = facts(
        "plan",
        model=f"{plan.model} ({plan.model_type}, {plan.fingerprint[:12]})",
        policy=f"{plan.policy} {options}".strip(),
        target=f"{plan.target}, {plan.ranks} rank{'s' if plan.ranks > 1 else ''}",
        expert_bytes=f"{megabytes(plan.bytes_before)} -> {megabytes(plan.bytes_after)} ({ratio:.3f}, allowed {plan.memory:g})",
    )
    for remark in plan.remarks:
        head.add_row("remark", remark)
    columns = ("layer", "LIS", "strict LIS", "slots", "replicas", "formats", "bytes", "error", "unreached")
    made = table("layers, on the calibration text", *columns)
    for layer in plan.layers:
        predicted = layer.predicted
        made.add_row(
            str(layer.index),
            f"{predicted.lis_before:.3f} -> {predicted.lis_after:.3f}",
            f"{predicted.strict_lis_before:.3f} -> {predicted.strict_lis_after:.3f}",
            str(len(layer.slots)),
            str(len(layer.slots) - layer.geometry.experts),
            formats_of(layer),
            f"{megabytes(predicted.bytes_before)} -> {megabytes(predicted.bytes_after)}",
            f"{predicted.error:.2e}",
            members(layer.unreached),
        )
    return [head, made]


def engine_tables(manifest: Manifest) -> list[RenderableType]:
    files = [manifest.graph, manifest.weights, *([manifest.tokenizer] if manifest.tokenizer else [])]
    library = f"op library rq.moe {manifest.op_library}" if manifest.op_library is not None else "any ONNX Runtime"
    head = facts(
        "engine",
        made_by=manifest.tool,
        files=", ".join(f"{file.name} ({megabytes(file.bytes)})" for file in files),
        runs_in=f"{library}; lowering {manifest.lowering}, opset {manifest.opset}",
        weights=f"{megabytes(manifest.expert_bytes)} of experts, {megabytes(manifest.dense_bytes)} of the rest",
        replaced=", ".join(f"{reason}: {count}" for reason, count in manifest.replaced.items()) or "nothing",
    )
    return [head, *plan_tables(manifest.plan)]


def evaluation_tables(evaluation: Evaluation) -> list[RenderableType]:
    before, after = evaluation.expert_bytes_before, evaluation.expert_bytes_after
    columns = ("text", "tokens", "perplexity of reference", "of engine", "change", "top-1 agreement", "KL (nats)")
    made = table(f"{evaluation.engine} against {evaluation.reference}", *columns)
    rows = evaluation.texts if len(evaluation.texts) == 1 else [*evaluation.texts, evaluation.total]
    for text in rows:
        made.add_row(
            text.name,
            str(text.tokens),
            f"{text.perplexity_reference:.3f}",
            f"{text.perplexity_engine:.3f}",
            f"{100 * (text.perplexity_engine / text.perplexity_reference - 1):+.2f} %",
            f"{100 * text.agreement:.2f} %",
            f"{text.kl:.2e}",
        )
    size = facts("experts", bytes=f"{megabytes(before)} -> {megabytes(after)} ({after / max(1, before):.3f})")
    return [made, balance_table(rows), size]


def balance_table(texts: list[TextEvaluation]) -> Table:
    columns = [column for text in texts for column in (text.name, "strict")]
    made = table("LIS before -> after, as the engine filled its slots", "layer", *columns)
    for position, layer in enumerate(texts[0].layers):
        cells = []
        for text in texts:
            found = text.layers[position]
            cells.append(f"{found.lis_before:.3f} -> {found.lis_after:.3f}")
            cells.append(f"{found.strict_lis_before:.2f} -> {found.strict_lis_after:.2f}")
        made.add_row(str(layer.index), *cells)
    return made


def bench_tables(bench: Bench) -> list[RenderableType]:
    title = f"tokens/s, median of {bench.rounds} rounds: {bench.prompt_tokens} prompt tokens, {bench.new_tokens} new ones"
    made = table(title, "", "prefill", "decode")
    for speed in (bench.engine, bench.other):
        if speed is not None:
            made.add_row(speed.name, f"{speed.prefill:.1f}", f"{speed.decode:.1f}")
    if bench.ratio_prefill is not None and bench.ratio_decode is not None:
        made.add_row("ratio", f"{bench.ratio_prefill:.2f}", f"{bench.ratio_decode:.2f}")
    return [made]
