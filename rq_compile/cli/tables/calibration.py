"""A calibration as tables."""

from __future__ import annotations

from collections import Counter

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from rq_compile.calibration.schema import Calibration, LayerCalibration
from rq_compile.cli.tables.layout import facts, members, short_names, table
from rq_compile.planning import metrics
from rq_compile.planning.skew import outlook, skew_of
from rq_compile.quantization.formats import DENSE_QUANTIZED, FORMATS, Format

# Errors below this are rounding of fp32 arithmetic.
EXACT = 1e-12


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
