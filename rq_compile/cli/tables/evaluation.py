"""Results of ``evaluate`` and ``bench`` as tables."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from rq_compile.cli.tables.layout import change, facts, figure, megabytes, short_names, table
from rq_compile.evaluation.schema import Bench, Evaluation, TextEvaluation


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
