"""The sizes of layers that the built GPU kernels of docs/kernels.md support."""

from rq_compile.errors import UserError
from rq_compile.planning.schema import LayerPlan
from rq_compile.quantization.formats import QUANTIZED_FORMATS, block_size

MULTIPLE_OF_SIZES = 16
MULTIPLE_OF_BLOCKS = 64


def check_kernel_sizes(layer: LayerPlan, otherwise: str) -> None:
    """``otherwise``: what to do with an unsupported layer, as the end of a sentence.

    Raises:
        UserError: no kernel supports the layer's sizes or the blocks of its quantized weights.
    """
    quantized = [slot.format for slot in layer.slots if slot.format in QUANTIZED_FORMATS]
    for name in ("hidden", "intermediate"):
        size = getattr(layer.geometry, name)
        if size % MULTIPLE_OF_SIZES:
            raise UserError(
                f"layer {layer.index} has {name} {size}, but the GPU kernels need multiples of {MULTIPLE_OF_SIZES}; {otherwise}",
                2,
            )
        block = block_size(size, layer.geometry.block)
        if quantized and block % MULTIPLE_OF_BLOCKS:
            raise UserError(
                f"layer {layer.index} has {name} {size} and thus {quantized[0]} in blocks of {block}, but the GPU kernels need "
                f"multiples of {MULTIPLE_OF_BLOCKS}; plan it in 16 bit, or {otherwise}",
                2,
            )
