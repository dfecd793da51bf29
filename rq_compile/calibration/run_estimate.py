"""Estimates the resources that calibrating a checkpoint needs, before any weight is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rq_compile.architectures.dense_modules import DenseModule, dense_modules
from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.architectures.without_engine import remarks_without_engine
from rq_compile.calibration.calibrate import Work, work_of
from rq_compile.calibration.dense_watch import BLOCK
from rq_compile.calibration.measure import MAX_PAIRS
from rq_compile.calibration.memory import used_memory
from rq_compile.estimates import RATES, Estimate
from rq_compile.quantization.formats import FLOAT_FORMATS, MEASURED_FORMATS, SLOT_FORMATS, Format, Quantizer, block_size
from rq_compile.standalone.limits import usable_cpus
from rq_compile.texts import Text

# Bytes of a number on a line of its own in an indented JSON file, and bytes of a layer other than its numbers.
JSON_NUMBER, JSON_SUM, JSON_LAYER = 14, 22, 1000
JSON_MODULE, JSON_MATRIX = 250, 210  # a non-expert module, and each of its matrices


def calibration_estimate(
    model: Model,
    texts: Mapping[str, str | Text],
    output: Path,
    *,
    tokens: int | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    quantizer: Quantizer = "gptq",
    formats: Sequence[Format] = MEASURED_FORMATS,
    memory_limit: int | None = None,
    device: str = "cpu",
) -> Estimate:
    """The resources that ``calibrate`` with these arguments needs; the texts are tokenized.

    Raises:
        UserError: see ``work_of``.
    """
    work = work_of(
        model,
        texts,
        tokens=tokens,
        batch_size=batch_size,
        sequence_length=sequence_length,
        memory_limit=memory_limit,
        device=device,
    )
    layers, way = work.layers, work.way
    outputs = {
        output.name: sum(_layer_json(layer, len(texts), len(work.batches), len(FLOAT_FORMATS) + len(formats)) for layer in layers)
    }
    dense = dense_modules(model)
    outputs[output.name] += sum(JSON_MODULE + JSON_MATRIX * len(module.matrices) for module in dense)
    statistics = sum(_statistics_bytes(layer) for layer in layers) if quantizer == "gptq" else 0
    statistics += sum(_moment_bytes(model, module) for module in dense) if statistics else 0
    if "constant" in formats:
        statistics += sum(4 * layer.geometry.experts * (layer.geometry.hidden + 1) for layer in layers)
    if statistics:
        outputs[output.with_suffix(".safetensors").name] = statistics
    hidden = [layer.geometry.hidden for layer in layers]
    # Layer by layer, the inputs of all tokens are kept for one layer and for the layer before it.
    recorded = 4 * (work.measured * sum(hidden) if way.whole else 2 * work.total * max(hidden))
    states = 0 if way.states_in_memory else 12 * work.rows * max(hidden)
    return Estimate(
        outputs=outputs,
        temporary_bytes=recorded + states + statistics,
        memory_bytes=used_memory() + way.memory,
        cores=usable_cpus(),
        seconds=_calibration_seconds(model, work, quantizer, sum(SLOT_FORMATS[format].computed for format in formats)),
        remarks=[*remarks_without_engine(model), *work.remarks],
    )


def _statistics_bytes(layer: MoeLayer) -> int:
    geometry = layer.geometry
    block = block_size(geometry.intermediate)
    return 4 * (geometry.hidden**2 + geometry.experts * -(-geometry.intermediate // block) * block**2)


def _moment_bytes(model: Model, module: DenseModule) -> int:
    """Bytes of the moments of the inputs of a module's matrices. Matrices with equally many columns read the same input, except
    the last one, which reads what the others give."""
    hidden = model.text_config.hidden_size
    shapes = [model.shape(name) for name in module.matrices]
    inputs = [*{columns for _, columns in shapes[:-1]}, shapes[-1][1]] if module.kind != "embedding" else []
    return sum(4 * (columns**2 if columns <= hidden else -(-columns // BLOCK) * BLOCK**2) for columns in inputs)


def _layer_json(layer: MoeLayer, texts: int, batch_count: int, formats: int) -> int:
    """Bytes of one layer in a calibration: loads, scores and errors of each expert, and the sums behind them."""
    numbers, sums = 2 + texts + batch_count + formats, 2 + 2 * formats
    return JSON_LAYER + layer.geometry.experts * (JSON_NUMBER * numbers + JSON_SUM * sums)


def _calibration_seconds(model: Model, work: Work, quantizer: Quantizer, formats: int) -> float:
    """Seconds to run every token through the model, to round every expert, and to run some of each expert's tokens through its
    rounded weights, in each of so many formats. As a whole, the experts run again to be measured; layer by layer, only norms and
    routers run twice."""
    experts = [layer.geometry for layer in work.layers]
    held = sum(geometry.expert_weights * geometry.experts for geometry in experts)
    active = sum(geometry.expert_weights * geometry.top_k for geometry in experts)
    dense = model.parameter_count - held
    products = 2.0 * work.rows * (dense + active)
    for geometry in experts:
        pairs = work.measured * geometry.top_k
        sampled = min(pairs, MAX_PAIRS * geometry.experts) * formats
        products += 2.0 * geometry.expert_weights * (sampled + pairs * work.way.whole)
    rounding = held * formats / (RATES.gptq if quantizer == "gptq" else RATES.nearest)
    return RATES.start + 4 * model.parameter_count / RATES.read + (products / RATES.flops + rounding) / usable_cpus()
