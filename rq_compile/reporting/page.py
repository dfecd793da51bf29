"""A self-contained HTML page about an engine, with inline styles and charts. It has no scripts, loads nothing and is
reproducible."""

import shlex
from pathlib import Path
from statistics import fmean

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rq_compile.calibration.schema import Calibration
from rq_compile.engine.manifest import Manifest
from rq_compile.evaluation.schema import Bench, Evaluation, LayerBalance
from rq_compile.planning.schema import LayerPlan, LayerPrediction, Plan
from rq_compile.planning.skew import Skew, skew, skew_of
from rq_compile.planning.sweep import Sweep
from rq_compile.reporting.charts import Bar, balance_scale, bars, slot_sizes, stored_layers
from rq_compile.reporting.curves import curves
from rq_compile.reporting.headline import headline
from rq_compile.reporting.maps import formats_legend, legend, maps
from rq_compile.reporting.modules import module_kinds

# The balance of every layer, by its number in the model.
Balances = list[tuple[int, LayerPrediction | LayerBalance]]
TEMPLATES = Path(__file__).parent / "templates"


def page(
    engine: str,
    manifest: Manifest,
    evaluation: Evaluation | None,
    bench: Bench | None,
    sweep: Sweep | None = None,
    calibration: Calibration | None = None,
) -> str:
    """The page of the engine called ``engine``. It says what was not measured, and the command that measures it.

    All names are escaped.
    """
    plan = manifest.plan
    predicted: Balances = [(layer.index, layer.predicted) for layer in plan.layers]
    measured: Balances = [] if evaluation is None else [(layer.index, layer) for layer in evaluation.total.layers]
    return (
        environment()
        .get_template("report.html")
        .render(
            headline=headline(engine, manifest, evaluation, bench),
            manifest=manifest,
            plan=plan,
            maps=maps(plan),
            legend=legend(),
            formats_legend=formats_legend(plan),
            predicted=predicted,
            measured=measured,
            scale=balance_scale(balance.lis_before for _, balance in [*predicted, *measured]),
            skews=skews(plan, calibration),
            layers=stored_layers(plan),
            sizes=slot_sizes(plan),
            memory=bars(
                ("experts in the checkpoint", plan.bytes_before, False),
                ("all slots of the plan", plan.bytes_after, True),
                ("experts in this engine", manifest.expert_bytes, True),
            ),
            module_kinds=module_kinds(plan),
            sweep=sweep,
            curves=[] if sweep is None else curves(sweep, plan),
            evaluation=evaluation,
            bench=bench,
            speeds=[] if bench is None else speeds(plan.model, bench),
            commands=commands(engine, plan.model),
        )
    )


def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"size": size, "rate": rate, "percent": percent, "mean": mean, "figure": figure, "nats": nats}
    return made


def skews(plan: Plan, calibration: Calibration | None) -> list[tuple[int, Skew]]:
    """The skew of each layer whose loads are known, by layer index. Only a calibration has the loads of single texts."""
    if calibration is not None:
        return [(layer.index, skew_of(layer)) for layer in calibration.layers]
    return [(layer.index, skew(load)) for layer in plan.layers if (load := expert_loads(layer)) is not None]


def expert_loads(layer: LayerPlan) -> np.ndarray | None:
    """Share of the layer's tokens that each expert gets, float64 ``[m]``; None if the load of some slot is not known."""
    shares = [slot.load for slot in layer.slots if slot.load is not None]
    if len(shares) < len(layer.slots):
        return None
    return np.bincount([slot.expert for slot in layer.slots], shares, layer.geometry.experts)


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count:,.0f} bytes"


def nats(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f} tokens/s" if tokens_per_second >= 100 else f"{tokens_per_second:.1f} tokens/s"


def mean(balances: Balances, name: str) -> float | None:
    """The mean over the layers; None if the value of some layer is not known."""
    known = [getattr(balance, name) for _, balance in balances]
    return None if None in known else fmean(known)


def figure(value: float | None, spec: str) -> str:
    """``value`` in the format ``spec``. None stands for an infinite number or NaN."""
    return "not finite" if value is None else format(value, spec)


def percent(value: float) -> str:
    """The position or length of a mark, in per cent."""
    return f"{value:.2f}".rstrip("0").rstrip(".") + "%"


def speeds(model: str, bench: Bench) -> list[tuple[str, float | None, list[Bar]]]:
    """Name, ratio and bars for prefill and for decode."""
    made = []
    for kind, ratio in (("prefill", bench.ratio_prefill), ("decode", bench.ratio_decode)):
        values = [(bench.engine.name, getattr(bench.engine, kind), True)]
        if bench.other is not None:
            values.insert(0, (other_side(model, bench.other.name), getattr(bench.other, kind), False))
        made.append((kind, ratio, bars(*values)))
    return made


def other_side(model: str, name: str) -> str:
    """Describes the other side of a benchmark: ``bench --against`` takes engines and checkpoints."""
    if name.endswith(".onnx"):
        return f"{name}, another engine"
    return f"the original, {name}, in transformers, fp32" if name == model else f"{name}, in transformers, fp32"


def commands(engine: str, model: str) -> dict[str, str]:
    """The commands that measure the missing parts, and that make the page with all parts."""
    quoted, reference = shlex.quote(engine), shlex.quote(model)
    return {
        "evaluate": f"rq-compile evaluate {quoted} --reference {reference} --text FILE --json > evaluation.json",
        "bench": f"rq-compile bench {quoted} --against {reference} --json > bench.json",
        "report": f"rq-compile report {quoted} --evaluation evaluation.json --bench bench.json -o report.html",
    }
