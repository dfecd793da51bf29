"""The sizes of layers that the built GPU kernels of docs/kernels.md support."""

from rq_compile.errors import UserError
from rq_compile.planning.schema import LayerPlan
from rq_compile.quantization.formats import PACKED_FORMATS, block_size

MULTIPLE_OF_SIZES = 16
MULTIPLE_OF_BLOCKS = 64
MULTIPLE_OF_MX_BLOCKS = 32


def supports_fp8(layer: LayerPlan) -> bool:
    """Whether there are kernels for the layer's slots in fp8, if it has any: for layers without another format, and blocks of
    ``MULTIPLE_OF_BLOCKS``."""
    geometry, formats = layer.geometry, {slot.format for slot in layer.slots}
    blocks = [block_size(columns, geometry.block) for columns in (geometry.hidden, geometry.intermediate)]
    return "fp8" not in formats or (formats == {"fp8"} and not any(block % MULTIPLE_OF_BLOCKS for block in blocks))


def check_kernel_sizes(layer: LayerPlan, otherwise: str) -> None:
    """``otherwise``: what to do with an unsupported layer, as the end of a sentence.

    Raises:
        UserError: no kernel supports the layer's sizes or the blocks of its quantized weights.
    """
    quantized = [slot.format for slot in layer.slots if slot.format in PACKED_FORMATS]
    alone = [format for format in quantized if PACKED_FORMATS[format].exponents]
    if alone and (others := sorted({slot.format for slot in layer.slots} - {alone[0]})):
        raise UserError(
            f"layer {layer.index} has slots in {alone[0]} and in {others[0]}, but the GPU kernels support {alone[0]} only in "
            f"layers without another format; {otherwise}",
            2,
        )
    multiple = MULTIPLE_OF_MX_BLOCKS if alone else MULTIPLE_OF_BLOCKS
    for name in ("hidden", "intermediate"):
        size = getattr(layer.geometry, name)
        if size % MULTIPLE_OF_SIZES:
            raise UserError(
                f"layer {layer.index} has {name} {size}, but the GPU kernels need multiples of {MULTIPLE_OF_SIZES}; {otherwise}",
                2,
            )
        block = block_size(size, layer.geometry.block)
        if quantized and block % multiple:
            raise UserError(
                f"layer {layer.index} has {name} {size} and thus {quantized[0]} in blocks of {block}, but the GPU kernels need "
                f"multiples of {multiple}; plan it in 16 bit, or {otherwise}",
                2,
            )
