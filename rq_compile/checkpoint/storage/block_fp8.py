"""float8_e4m3 weights with scales: one per block of a grid, one per row, or one for all; also FP4 experts stored in the same way.

``quant_method`` fp8 (DeepSeek-V3, Qwen3, MiniMax), mxfp8, fbgemm_fp8; compressed-tensors float-quantized; ModelOpt FP8. The
scales of ``X`` are ``X_scale_inv`` or ``X_scale``; those of ``N.weight`` may also be ``N.scale`` (DeepSeek-V4) or
``N.qscale_weight`` (Mistral). A weight is the code times the scale, whatever the scale's name suggests. uint8 and float8_e8m0
scales are exponents. int8 or uint8 codes with such scales are pairs of float4_e2m1.
"""

from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.checkpoint.storage.packings import E2M1_PAIRS, E4M3
from rq_compile.checkpoint.storage.quantized import Quantized
from rq_compile.checkpoint.storage.scales import EXPONENTS, check_kind, grid_of, in_groups
from rq_compile.checkpoint.storage.stated import Stated
from rq_compile.errors import UserError

SCALES = ("F32", "BF16", "F16", *EXPONENTS)
FP4_GROUP = 32
SUFFIXES = ("_scale_inv", "_scale")
NEIGHBOURS = (".scale", ".qscale_weight")


def claim(name: str, tensors: dict[str, StoredTensor], stated: Stated) -> Quantized | None:
    """``name`` as a weight in this format, or None.

    Raises:
        UserError: the scales' shape or dtype is not that of this format.
    """
    codes = tensors[name]
    if len(codes.shape) < 2 or codes.dtype not in ("F8_E4M3", "I8", "U8"):
        return None
    scale = scale_of(name, tensors)
    if scale is None:
        return None
    if len(found := scales_of(name, tensors)) > 1:
        raise UserError(
            f"{name} in {codes.file} has two tensors of scales, {found[0]} and {found[1]}; remove the one that is wrong", 2
        )
    pairs = codes.dtype != "F8_E4M3"
    if pairs and tensors[scale].dtype not in EXPONENTS:
        return None
    shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if pairs else codes.shape
    format = "FP4 (e2m1)" if pairs else "FP8 (e4m3)"
    module = name.removesuffix(".weight")
    check_kind(name, codes, stated.floats(module), floats=True)
    if pairs:
        scales = in_groups(scale, tensors[scale], shape, FP4_GROUP, format, EXPONENTS)
    else:
        scales = grid_of(scale, tensors[scale], shape, format, stated.block(module), SCALES)
    shared = f"{scales.height}x{scales.width}"
    if scales.grid[1:] == (1, 1):
        shared = "per tensor"
    elif scales.grid[1:] == (shape[-2], 1):
        shared = "per row"
    return Quantized(
        name=name,
        shape=shape,
        format=f"{format.split()[0]} {shared}",
        parts={name: codes, scale: tensors[scale]},
        packed=name,
        packing=E2M1_PAIRS if pairs else E4M3,
        scales=scales,
    )


def scale_of(name: str, tensors: dict[str, StoredTensor]) -> str | None:
    """The tensor that holds the scales of the weight ``name``."""
    return next(iter(scales_of(name, tensors)), None)


def scales_of(name: str, tensors: dict[str, StoredTensor]) -> list[str]:
    """All tensors that have the name of its scales."""
    stem = name.removesuffix(".weight")
    names = [f"{name}{suffix}" for suffix in SUFFIXES]
    names += [f"{stem}{suffix}" for suffix in NEIGHBOURS] if stem != name else []
    return [scale for scale in names if scale in tensors]
