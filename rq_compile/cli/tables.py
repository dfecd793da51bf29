"""Calibrations, plans, engines and results as tables for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from rq_compile.calibration.schema import Calibration, LayerCalibration
from rq_compile.cli.screen import duration
from rq_compile.engine.manifest import Manifest
from rq_compile.errors import printable
from rq_compile.evaluation.schema import Bench, Evaluation, TextEvaluation
from rq_compile.packaging.package import Package
from rq_compile.planning import metrics
from rq_compile.planning.replan import Change, Changes
from rq_compile.planning.schema import LayerPlan, Plan
from rq_compile.planning.skew import outlook, skew_of
from rq_compile.planning.sweep import Sweep
from rq_compile.quantization.formats import DENSE_QUANTIZED, FORMATS, Format

if TYPE_CHECKING:
    from rq_compile.estimates import Estimate

# Errors below this are rounding of fp32 arithmetic.
EXACT = 1e-12


class TitledTable(Table):
    """A table as wide as its cells. Longer headings wrap; the title does not. If the terminal is still narrower, cells wrap.
    Nothing is cut off."""

    def __init__(self, title: str) -> None:
        super().__init__(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        self.heading = printable(title)

    def add_row(self, *cells: Any, **options: Any) -> None:
        cells = tuple(printable(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*cells, **options)
        for column, cell in zip(self.columns, cells, strict=False):
            longest_word = max(map(len, str(column.header).split()), default=0)
            column.max_width = max(column.max_width or longest_word, len(cell))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.heading, style="bold")
        yield from super().__rich_console__(console, options)


def table(title: str, *columns: str) -> TitledTable:
    """A table whose first column is text and whose others are numbers."""
    made = TitledTable(title)
    for position, column in enumerate(columns):
        made.add_column(printable(column), justify="left" if position == 0 else "right", overflow="fold")
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
    for name, value in values.items():
        made.add_row(name.replace("_", " "), str(value))
    return made


def short_names(files: list[str]) -> list[str]:
    """The names up to their first dot, if that keeps them different."""
    short = [file.split(".")[0] for file in files]
    return short if len(set(short)) == len(files) and all(short) else files


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


def calibration_tables(calibration: Calibration) -> list[RenderableType]:
    layers = calibration.layers
    measured = [format for format in FORMATS if format in layers[0].error]
    costly = [format for format in measured if any(sum(layer.error[format]) > EXACT for layer in layers)]
    worst = max(layers, key=lis)
    head = facts(
        "calibration",
        model=f"{calibration.model} ({calibration.model_type}, {calibration.dtype}); {experts_of(calibration)}",
        texts=", ".join(f"{text.name} ({text.tokens} tokens{counted(text.weight)})" for text in calibration.texts),
        tokens=f"{calibration.tokens} (and {calibration.padding_tokens} of padding, not counted)",
        LIS=f"{sum(map(lis, layers)) / len(layers):.3f} on average, at most {lis(worst):.3f} (layer {worst.index})",
        lossless=" ".join(format for format in measured if format not in costly) or "in no format",
    )
    if calibration.data_free:
        head.add_row("measured", "without text: loads are assumed to be uniform, errors are estimated from the weights alone")
    elif not calibration.measured_tokens:
        head.add_row("measured", "not on these tokens: errors are those of an earlier calibration, scaled by the experts' shares")
    elif calibration.measured_tokens < calibration.tokens:
        head.add_row("measured", f"on {calibration.measured_tokens} tokens, evenly spread")
    skews = [skew_of(layer) for layer in layers]
    if not calibration.data_free:
        head.add_row("outlook", outlook(skews))
    if dropped := sum(layer.dropped for layer in layers):
        head.add_row("dropped", f"{dropped} tokens beyond an expert's capacity, counted as load")
    texts = short_names([text.name for text in calibration.texts]) if len(calibration.texts) > 1 else []
    columns = ("layer", "LIS", *(f"on {text}" for text in texts), "Gini", "busiest tenth", "agreement")
    made = table("load", *columns, "heavy hitter", "its load", "unreached")
    for layer, found in zip(layers, skews, strict=True):
        load = layer.load
        made.add_row(
            str(layer.index),
            f"{lis(layer):.3f}",
            *(f"{lis_of(text_load):.3f}" for text_load in (layer.text_loads if texts else [])),
            f"{found.gini:.3f}",
            f"{100 * found.busiest_tenth:.0f} %",
            "-" if found.agreement is None else f"{found.agreement:.2f}",
            str(load.index(max(load))),
            str(max(load)),
            members([expert for expert, count in enumerate(load) if count == 0]),
        )
    return [head, made, errors_table(layers, costly), *dense_errors_table(calibration)]


def dense_errors_table(calibration: Calibration) -> list[RenderableType]:
    """What rounding the non-expert weights costs, if it was measured."""
    made = table("non-expert weights, change of the model in nats", "module", "kind", *(f"in {f}" for f in DENSE_QUANTIZED))
    for module in calibration.dense:
        errors = (f"{module.relative_error(format):.2e}" for format in DENSE_QUANTIZED)
        made.add_row(module.name, module.kind, *errors)
    return [made] if calibration.dense else []


def errors_table(layers: list[LayerCalibration], formats: list[Format]) -> Table:
    columns = (*(f"all in {format}" for format in formats), "too few tokens to measure")
    blocks = f"quantized in blocks of {layers[0].geometry.block}"
    made = table(f"relative squared error of the output, {blocks}", "layer", *columns)
    for layer in layers:
        made.add_row(
            str(layer.index),
            *(f"{sum(layer.error[format]):.2e}" if format in layer.error else "-" for format in formats),
            members([expert for expert in layer.estimated if layer.load[expert]]),
        )
    return made


def counted(weight: float) -> str:
    return "" if weight == 1 else f", each counted {weight:.3g} times"


def experts_of(calibration: Calibration) -> str:
    kinds = Counter((layer.geometry.experts, layer.geometry.top_k) for layer in calibration.layers)
    return ", ".join(f"{count} layers of {experts} experts, top-{top_k}" for (experts, top_k), count in kinds.items())


def lis(layer: LayerCalibration) -> float:
    return lis_of(layer.load)


def lis_of(load: list[int]) -> float:
    return float(metrics.lis(np.asarray(load), len(load)))


def formats_of(layer: LayerPlan) -> str:
    counts = Counter(slot.format for slot in layer.slots)
    return " ".join(f"{format}:{counts[format]}" for format in FORMATS if counts[format])


def plan_tables(plan: Plan) -> list[RenderableType]:
    def of_all(size: int) -> str:
        return f"{megabytes(size)} ({size / max(1, plan.bytes_before):.3f})"

    head = facts(
        "plan",
        model=f"{plan.model} ({plan.model_type}, {plan.fingerprint[:12]})",
        policy=plan.policy,
        options=" ".join(f"{name}={value}" for name, value in plan.options.items() if value != ""),
        target=f"{plan.target}, {plan.ranks} rank{'s' if plan.ranks > 1 else ''}",
        expert_bytes=f"{megabytes(plan.bytes_before)} -> {of_all(plan.bytes_after)} in slots, {of_all(plan.stored_bytes)} if "
        f"equal copies are stored once; allowed {plan.memory:g}",
    )
    if plan.predicted_engine_bytes is not None and plan.engine_bytes is not None:
        head.add_row("engine bytes", f"{megabytes(plan.predicted_engine_bytes)} of {megabytes(plan.engine_bytes)}")
    if plan.optimality is not None:
        best = plan.optimality
        head.add_row("objective", f"{best.objective:.4g}, at most {100 * best.gap:.2g} % of it above the best within the budget")
    head.add_row("predicted time", ", ".join(times(plan.layers)) or "not known")
    for remark in plan.remarks:
        head.add_row("remark", remark)
    return [head, stored_table(plan), *dense_table(plan), balance_prediction(plan), *batches_table(plan)]


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
    columns = ("memory", "MB", "error", "LIS", "time of a step", "of a token", "replicas", "formats")
    made = table("one plan for each budget; means over the layers, times as multiples of those without a plan", *columns)
    for point in sweep.points:
        made.add_row(
            f"{point.memory:g}",
            f"{point.bytes / 1e6:.2f}",
            f"{point.error:.2e}",
            f"{point.lis:.3f}",
            *("-" if time is None else f"{time:.3f}" for time in (point.step_time, point.token_time)),
            str(point.replicas),
            " ".join(f"{format}:{count}" for format, count in point.slots.items()),
        )
    return [head, made]


def stored_table(plan: Plan) -> Table:
    made = table("experts", "layer", "slots", "replicas", "formats", "MB in slots", "MB stored", "error", "unreached")
    for layer in plan.layers:
        predicted = layer.predicted
        made.add_row(
            str(layer.index),
            str(len(layer.slots)),
            str(len(layer.slots) - layer.geometry.experts),
            formats_of(layer),
            f"{predicted.bytes_before / 1e6:.2f} -> {predicted.bytes_after / 1e6:.2f}",
            f"{layer.stored_bytes / 1e6:.2f}",
            f"{predicted.error:.2e}",
            members(layer.unreached),
        )
    return made


def dense_table(plan: Plan) -> list[RenderableType]:
    """The non-expert modules, if the plan decides their formats."""
    made = table("non-expert weights", "module", "kind", "format", "MB", "error (nats)")
    for module in plan.dense:
        size = f"{module.bytes_stored / 1e6:.2f} -> {module.bytes / 1e6:.2f}"
        made.add_row(module.name, module.kind, module.format, size, f"{module.error:.2e}")
    return [made] if plan.dense else []


def balance_prediction(plan: Plan) -> Table:
    """Every measure of balance for every layer, before -> after, and the means over the layers."""
    columns = {
        "LIS": "lis",
        "of the worst text": "worst_text_lis",
        "strict LIS": "strict_lis",
        "padded work": "padded_work",
        "ranks, max / mean": "rank_imbalance",
    }
    known = {title: name for title, name in columns.items() if all(predicted(layer, name) is not None for layer in plan.layers)}
    made = table("balance, on the calibration text", "layer", *known)
    for layer in plan.layers:
        made.add_row(str(layer.index), *(change([predicted(layer, name)]) for name in known.values()))
    if len(plan.layers) > 1:
        means = [change([predicted(layer, name) for layer in plan.layers]) for name in known.values()]
        made.add_row("mean", *means)
    return made


def predicted(layer: LayerPlan, name: str) -> tuple[float, float] | None:
    before, after = (getattr(layer.predicted, f"{name}_{when}") for when in ("before", "after"))
    return None if before is None or after is None else (before, after)


def change(pairs: list[tuple[float, float] | None]) -> str:
    before, after = (sum(values) / len(values) for values in zip(*(pair for pair in pairs if pair), strict=True))
    return f"{before:.3f} -> {after:.3f}"


def times(layers: list[LayerPlan]) -> list[str]:
    """Predicted times after the plan divided by those before, for all ``layers`` together."""
    ratios = []
    for name, title in (("step_time", "of a batch"), ("token_time", "of one token")):
        if pairs := [pair for layer in layers if (pair := predicted(layer, name))]:
            ratios.append(f"{sum(after for _, after in pairs) / sum(before for before, _ in pairs):.2f} x {title}")
    return ratios


def batches_table(plan: Plan) -> list[RenderableType]:
    """LIS over batches, as means over the layers. Empty if the plan has no batches."""
    columns = ("sequences", "batches", "mean", "95th percentile")
    made = table("LIS of single batches, mean over the layers", *columns)
    for sizes in zip(*(layer.predicted.over_batches for layer in plan.layers), strict=False):
        made.add_row(
            str(sizes[0].sequences),
            str(sizes[0].batches),
            change([(size.lis_mean_before, size.lis_mean_after) for size in sizes]),
            change([(size.lis_p95_before, size.lis_p95_after) for size in sizes]),
        )
    return [made] if made.row_count else []


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


def evaluation_tables(evaluation: Evaluation) -> list[RenderableType]:
    before, after = evaluation.expert_bytes_before, evaluation.expert_bytes_after
    columns = ("text", "tokens", "perplexity of reference", "of engine", "change", "top-1 agreement", "KL (nats)")
    made = table(f"{evaluation.engine} against {evaluation.reference}", *columns)
    rows = evaluation.texts if len(evaluation.texts) == 1 else [*evaluation.texts, evaluation.total]
    names = [*short_names([text.name for text in evaluation.texts]), evaluation.total.name]
    for name, text in zip(names, rows, strict=False):
        made.add_row(
            name,
            str(text.tokens),
            figure(text.perplexity_reference, ".3f"),
            figure(text.perplexity_engine, ".3f"),
            figure(text.perplexity_change, "+.2f", " %"),
            f"{100 * text.agreement:.2f} %",
            figure(text.kl, ".2e"),
        )
    size = facts("experts", bytes=f"{megabytes(before)} -> {megabytes(after)} ({after / max(1, before):.3f})")
    if evaluation.total.layers:
        return [made, balance_table(names, rows), size]
    return [made, facts("balance", LIS="not measured: an engine of this lowering does not count the rows of its slots"), size]


def figure(value: float | None, spec: str, unit: str = "") -> str:
    return "not finite" if value is None else f"{value:{spec}}{unit}"


def balance_table(names: list[str], texts: list[TextEvaluation]) -> Table:
    made = table("balance, as the engine filled its slots", "text", "layer", "LIS", "strict LIS")
    for name, text in zip(names, texts, strict=False):
        rows = [(str(layer.index), [layer]) for layer in text.layers]
        if len(rows) > 1:
            rows.append(("mean", text.layers))
        for row, (which, layers) in enumerate(rows):
            made.add_row(
                name if row == 0 else "",
                which,
                change([(layer.lis_before, layer.lis_after) for layer in layers]),
                change([(layer.strict_lis_before, layer.strict_lis_after) for layer in layers]),
            )
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
