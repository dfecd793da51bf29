"""A plan as tables."""

from __future__ import annotations

from collections import Counter

from rich.console import RenderableType
from rich.table import Table

from rq_compile.cli.tables.layout import change, counts, facts, megabytes, members, table
from rq_compile.planning.schema import LayerPlan, Plan
from rq_compile.quantization.formats import FORMATS


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
    if plan.model_error is not None:
        head.add_row("model error", f"{plan.model_error:.2e} nats, of experts and non-expert weights together")
    if plan.optimality is not None:
        best = plan.optimality
        head.add_row("objective", f"{best.objective:.4g}, at most {100 * best.gap:.2g} % of it above the best within the budget")
    head.add_row("predicted time", ", ".join(times(plan.layers)) or "not known")
    for remark in plan.remarks:
        head.add_row("remark", remark)
    return [head, stored_table(plan), *dense_table(plan), balance_prediction(plan), *batches_table(plan)]


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


def formats_of(layer: LayerPlan) -> str:
    held = Counter(slot.format for slot in layer.slots)
    return counts({format: held[format] for format in FORMATS if held[format]})


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
