"""Presents a checkpoint as if it had never been quantized: every weight, from whichever tensors store it.

Each storage format is tried in turn for every tensor. A format decides by the tensor's neighbours, their dtypes and shapes. A
leftover ``quantization_config`` does not affect tensors that are plain.
"""

from collections.abc import Callable
from typing import Any

from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.checkpoint.storage import awq, block_fp8, four_bit_float, gptq, integers, mxfp4
from rq_compile.checkpoint.storage.block_fp8 import scale_of
from rq_compile.checkpoint.storage.foreign import OTHERWISE, not_read, refuse_codes, refuse_foreign
from rq_compile.checkpoint.storage.stated import Stated
from rq_compile.checkpoint.storage.weight import Weight, plain
from rq_compile.errors import UserError

Claim = Callable[[str, dict[str, StoredTensor], Stated], Weight | None]
CLAIMS: tuple[Claim, ...] = (mxfp4.claim, four_bit_float.claim, integers.claim, awq.claim, gptq.claim, block_fp8.claim)
# Tensors beside quantized weights, for kernels that quantize activations or the cache. The weights do not depend on them.
NOT_OF_WEIGHTS = (
    *(".input_scale", ".input_scale_inv", ".input_global_scale", ".input_zero_point", ".input_scale_ub", ".output_scale"),
    *(".activation_scale", ".activation_scale_inv", ".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_output_scale"),
    ".qscale_act",
)
# A tensor with one of these names is useless without the weight that it belongs to.
OF_WEIGHTS = (
    *("weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point", "weight_packed"),
    *("weight_g_idx", "weight_shape", "qscale_weight", "qweight", "qzeros", "g_idx", "pre_quant_scale"),
)
PLAIN = ("F64", "F32", "F16", "BF16")
CODES = ("F8_E4M3", "F8_E8M0", "I8", "U8", "I32")
FAKE = ("dense", "fakequant")  # formats of compressed-tensors whose weights are floats, with scales beside them


def weights_of(tensors: dict[str, StoredTensor], stated: Stated) -> dict[str, Weight]:
    """Every weight by the name that it has in an unquantized checkpoint; other tensors by their own names.

    Raises:
        UserError: parts of a quantized weight are missing or do not fit together, or a weight is stored in an unsupported format.
            The message names the tensor and the format.
    """
    refuse_foreign(tensors)
    weights: dict[str, Weight] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            continue
        weight = next((found for claim in CLAIMS if (found := claim(name, tensors, stated)) is not None), None)
        if weight is not None:
            if weight.name in weights or (weight.name in tensors and weight.name not in weight.parts):
                raise UserError(
                    f"{weight.name} is stored twice, once as {weight.format} in {tensor.file}; remove one of the two", 2
                )
            weights[weight.name] = weight
            used.update(weight.parts)
    if weights:
        _check_transforms(stated, next(iter(weights)))
    else:
        refuse_codes(tensors, stated)
    modules = {name.rpartition(".")[0] for name in weights}
    for name, tensor in tensors.items():
        if name in used or (modules and name.endswith(NOT_OF_WEIGHTS)):
            continue
        _check_plain(name, tensor, tensors, stated)
        if not (modules and _is_part(name)):
            weights[name] = plain(name, tensor)
    return weights


def _is_part(name: str) -> bool:
    return name.rpartition(".")[2] in OF_WEIGHTS


def _check_plain(name: str, tensor: StoredTensor, tensors: dict[str, StoredTensor], stated: Stated) -> None:
    """
    Raises:
        UserError: the tensor is, or belongs to, a quantized weight that no format has claimed.
    """
    stem, _, last = name.rpartition(".")
    is_weight = last in ("weight", "weight_packed", "qweight") or last.endswith("_proj")
    packed = last in ("weight_packed", "qweight") or tensor.dtype == "F8_E4M3" or bool(stated.method)
    if is_weight and packed and len(tensor.shape) > 1 and tensor.dtype not in PLAIN:
        raise _unread(name, tensor, tensors, stated)
    if is_weight and tensor.dtype in PLAIN and f"{name}_scale_inv" in tensors:
        raise UserError(
            f"{name} in {tensor.file} is {tensor.dtype} but has scales ({name}_scale_inv), which would change it; "
            "remove the scales if it is dequantized",
            2,
        )
    if _is_part(name) and f"{stem}.weight" not in tensors and f"{stem}.weight_packed" not in tensors and last != "g_idx":
        raise UserError(
            f"{name} in {tensor.file} belongs to a weight that is missing: {stem}.weight; remove it, "
            "or save the checkpoint again with the tool that quantized it",
            2,
        )


def _unread(name: str, tensor: StoredTensor, tensors: dict[str, StoredTensor], stated: Stated) -> UserError:
    if tensor.dtype == "F8_E4M3" and scale_of(name, tensors) is None:
        return UserError(
            f"{name} in {tensor.file} is stored as FP8, but its scales ({name}_scale_inv or another) are missing; "
            "save the checkpoint again with the tool that quantized it",
            2,
        )
    return not_read(name, tensor, stated.method or "none")


def _check_transforms(stated: Stated, name: str) -> None:
    """
    Raises:
        UserError: the inputs of the weights would have to be transformed.
    """
    transforms: Any = stated.settings.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise UserError(
            f"{stated.file} has a transform_config: {name} is stored rotated, so its inputs must be, too; {OTHERWISE}",
            2,
        )
