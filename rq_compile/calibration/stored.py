"""How the checkpoint stores its experts, for a calibration, and how slots can hold them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.calibration.schema import LayerCalibration
from rq_compile.checkpoint.storage.weight import Plain, Weight
from rq_compile.errors import UserError
from rq_compile.quantization.formats import (
    BLOCKS,
    COMPUTED_FORMATS,
    FORMATS,
    MEASURABLE_FORMATS,
    MEASURED_FORMATS,
    SLOT_FORMATS,
    Block,
    Format,
)


def layers_to_measure(model: Model, block: Block | None) -> list[MoeLayer]:
    """The model's layers, to be rounded in blocks of ``block`` weights; None: see ``block_of``."""
    return [
        replace(layer, geometry=layer.geometry.model_copy(update={"block": block or block_of(model.stored_experts(layer))}))
        for layer in model.layers
    ]


def stored_layer(model: Model, layer: MoeLayer) -> dict[str, Any]:
    """``stored_as`` and ``stored_bytes`` of ``LayerCalibration``."""
    if not model.quantized:
        return {}
    formats = {weight.format for weight in model.stored_experts(layer) if not isinstance(weight, Plain)}
    return {"stored_as": sorted(formats), "stored_bytes": model.stored_bytes[layer.name]}


def formats_to_measure(
    model: Model, layers: Sequence[MoeLayer], rounded: Sequence[Format] = MEASURED_FORMATS
) -> tuple[Format, ...]:
    """The ``rounded`` ones, all that are not quantized, and those that hold experts as the checkpoint stores them. ``layers``:
    with the blocks of the slots.

    Raises:
        UserError: nothing is rounded to one of the formats.
    """
    if wrong := [format for format in rounded if format not in MEASURABLE_FORMATS]:
        raise UserError(f"nothing is rounded to {wrong[0]}; choose --formats among {', '.join(MEASURABLE_FORMATS)}", 2)
    carried = {
        weight.slot_format
        for layer in layers
        for weight in model.stored_experts(layer)
        if (group := _group(weight)) is not None and group % layer.geometry.block == 0
    }
    measured = {*rounded, *carried}
    return tuple(format for format in FORMATS if not SLOT_FORMATS[format].quantized or format in measured)


def block_of(experts: Sequence[Weight]) -> Block:
    """The maximum number of weights per scale in slots that hold the stored ``experts`` exactly; 128 if no slots can."""
    groups = {_group(weight) for weight in experts if not isinstance(weight, Plain)}
    if None in groups:
        return BLOCKS[0]
    smallest = min((group for group in groups if group), default=0)
    return next((block for block in BLOCKS if smallest % block == 0), BLOCKS[0])


def _group(weight: Weight) -> int | None:
    """``Weight.source_group``; 0 if all columns of a row share a scale, which blocks of any size may have."""
    group = weight.source_group
    return 0 if group is not None and group >= weight.matrix_shape[1] else group


def lossless_format(model: Model, layers: Sequence[LayerCalibration]) -> Format:
    """The smallest format that stores every expert of a quantized checkpoint exactly; for other checkpoints, their own format."""
    if not model.quantized:
        return model.dtype
    lossless = [format for format in COMPUTED_FORMATS if all(not any(layer.error.get(format, [1.0])) for layer in layers)]
    return min(lossless, key=lambda format: (SLOT_FORMATS[format].bits, format != model.dtype))
