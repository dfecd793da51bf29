"""The plugin library of ``plugins/tensorrt``, without loading it: which file is one, and which layers its kernels take."""

from pathlib import Path

from rq_compile.errors import UserError
from rq_compile.planning.schema import LayerPlan
from rq_compile.quantization.formats import QUANTIZED_FORMATS, block_size

# The file's format, the function that TensorRT calls in it, and the plugin that the network names.
ELF = b"\x7fELF"
CONTAINS = (b"getCreators", b"MoeLayer", b"rq.moe")
# What the built kernels ask of sizes, and of blocks of columns that share a scale.
MULTIPLE_OF_SIZES = 16
MULTIPLE_OF_BLOCKS = 64
README = "plugins/tensorrt/README.md"


def check_library(path: Path) -> None:
    """It is not loaded: it may be for another machine than this one.

    Raises:
        UserError: there is no such file, or it is no library of these plugins.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the plugin library {path}: {error.strerror}; build it as {README} says", 2) from error
    if not content.startswith(ELF) or any(part not in content for part in CONTAINS):
        raise UserError(f"{path} is no library of the plugin MoeLayer; build it as {README} says", 2)


def check_layer(layer: LayerPlan) -> None:
    """
    Raises:
        UserError: the kernels do not take the layer's sizes.
    """
    quantized = sorted({slot.format for slot in layer.slots} & set(QUANTIZED_FORMATS))
    for name in ("hidden", "intermediate"):
        size = getattr(layer.geometry, name)
        if size % MULTIPLE_OF_SIZES:
            raise UserError(
                f"layer {layer.index} has {name} {size}, where the plugins' kernels want multiples of "
                f"{MULTIPLE_OF_SIZES}; compile with --stock",
                2,
            )
        block = block_size(size, layer.geometry.block)
        if quantized and block % MULTIPLE_OF_BLOCKS:
            raise UserError(
                f"layer {layer.index} has {name} {size} and so {quantized[-1]} in blocks of {block}, where "
                f"the plugins' kernels want multiples of {MULTIPLE_OF_BLOCKS}; plan it in 16 bit, or compile with --stock",
                2,
            )
