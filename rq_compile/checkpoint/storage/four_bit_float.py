"""NVFP4 and MXFP4 of linear layers: pairs of float4_e2m1 in uint8, with one scale per 16 or 32 columns.

compressed-tensors' nvfp4-pack-quantized: ``weight_packed``, ``weight_scale`` float8_e4m3 ``[out, in / 16]``, divided by
``weight_global_scale``. mxfp4-pack-quantized: ``weight_scale`` exponents ``[out, in / 32]``. ModelOpt's NVFP4: ``weight``,
``weight_scale``, multiplied by ``weight_scale_2``. Its W4A16 recipes also have ``pre_quant_scale [in]``, by which the inputs, or
the weights as here, are multiplied.
"""

from functools import partial

import numpy as np

from rq_compile.checkpoint.safetensors_file import StoredTensor, read_tensor
from rq_compile.checkpoint.storage.packings import E2M1_PAIRS
from rq_compile.checkpoint.storage.quantized import Quantized
from rq_compile.checkpoint.storage.scales import EXPONENTS, check_dtype, in_groups, scaled_by, wrong_shape
from rq_compile.checkpoint.storage.stated import Stated
from rq_compile.errors import UserError

NVFP4_GROUP, MXFP4_GROUP = 16, 32
# The tensor with the global scale, and whether scales are divided by it.
GLOBAL = (("weight_global_scale", True), ("weight_scale_2", False))


def claim(name: str, tensors: dict[str, StoredTensor], stated: Stated) -> Quantized | None:
    """The weight whose packed codes ``name`` is, or None.

    Raises:
        UserError: a scale is missing, or a shape or dtype is not that of this format.
    """
    codes = tensors[name]
    stem, _, last = name.rpartition(".")
    if last not in ("weight_packed", "weight") or codes.dtype != "U8" or len(codes.shape) < 2:
        return None
    scale = f"{stem}.weight_scale"
    if scale not in tensors or (last == "weight" and tensors[scale].dtype != "F8_E4M3"):
        return None
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if tensors[scale].dtype in EXPONENTS:
        format, scales = "MXFP4", in_groups(scale, tensors[scale], shape, MXFP4_GROUP, "MXFP4", EXPONENTS)
        used = [scale]
    else:
        format, scales = "NVFP4", in_groups(scale, tensors[scale], shape, NVFP4_GROUP, "NVFP4", ("F8_E4M3",))
        factors = [(f"{stem}.{suffix}", divides) for suffix, divides in GLOBAL if f"{stem}.{suffix}" in tensors]
        if len(factors) > 1:
            raise UserError(
                f"{name} in {codes.file} has two global scales, {factors[0][0]} and {factors[1][0]}; "
                "remove the one that is wrong",
                2,
            )
        if not factors:
            raise UserError(
                f"{name} in {codes.file} is stored as NVFP4, but its global scale ({stem}.{GLOBAL[0][0]} or {GLOBAL[1][0]}) is "
                "missing; save the checkpoint again with the tool that quantized it",
                2,
            )
        ((factor, divides),) = factors
        scales, used = scaled_by(scales, factor, tensors[factor], divides=divides), [scale, factor]
    before = f"{stem}.pre_quant_scale"
    used += [before] if before in tensors else []
    return Quantized(
        name=f"{stem}.weight",
        shape=shape,
        format=format,
        parts={part: tensors[part] for part in (name, *used)},
        packed=name,
        packing=E2M1_PAIRS,
        scales=scales,
        column_scale=column_scale(before, tensors, shape[-1]),
    )


def column_scale(name: str, tensors: dict[str, StoredTensor], columns: int) -> partial[np.ndarray] | None:
    """The factors by which ModelOpt multiplies the inputs.

    Raises:
        UserError: its shape is not ``[columns]``.
    """
    if name not in tensors:
        return None
    if tensors[name].shape != (columns,):
        raise wrong_shape(name, tensors[name], (columns,), "one number for each input")
    check_dtype(name, tensors[name], ("F32", "BF16", "F16"), "a scale of the inputs")
    return partial(_read_fp32, name, tensors[name])


def _read_fp32(name: str, tensor: StoredTensor) -> np.ndarray:
    return read_tensor(name, tensor).astype(np.float32)
