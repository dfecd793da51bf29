"""GPTQ, versions 1 and 2.

``qweight`` int32 ``[in * bits / 32, out]``, ``qzeros`` int32 ``[groups, out * bits / 32]``, ``scales [groups, out]`` and
``g_idx [in]``. Words hold the first number in their lowest bits. ``checkpoint_format`` gptq (version 1, and the default if
nothing is stated) stores zero points minus one; gptq_v2 stores them as they are. AutoRound's auto_gptq packing is version 1.
"""

from functools import partial

from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.checkpoint.storage.decoding import read_differences
from rq_compile.checkpoint.storage.integers import FLOATS, column_order, format_name, order_missing
from rq_compile.checkpoint.storage.packings import column_words, zero_words
from rq_compile.checkpoint.storage.quantized import Quantized
from rq_compile.checkpoint.storage.scales import Scales, check_dtype, wrong_shape
from rq_compile.checkpoint.storage.stated import Stated
from rq_compile.errors import UserError

BITS = (4, 8)
FORMATS = {"": 1, "gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what is subtracted from a zero point
AUTO_ROUND = ("", "auto_round", "auto_round:auto_gptq", "auto_round:gptq", "auto_round:awq", "auto_round:auto_awq")


def claim(name: str, tensors: dict[str, StoredTensor], stated: Stated) -> Quantized | None:
    """The weight whose ``qweight`` is ``name``, or None.

    Raises:
        UserError: a part is missing, or its shape or dtype is not that of this format, or not what config.json states.
    """
    codes = tensors[name]
    stem, _, last = name.rpartition(".")
    if last != "qweight" or codes.dtype != "I32" or len(codes.shape) != 2:
        return None
    zero, scale, index = f"{stem}.qzeros", f"{stem}.scales", f"{stem}.g_idx"
    check_parts(name, codes, (zero, scale), tensors)
    if is_awq(codes, tensors[scale]):
        return None
    variant = stated.text("checkpoint_format")
    if variant not in FORMATS or stated.text("packing_format") not in AUTO_ROUND:
        named = variant if variant not in FORMATS else stated.text("packing_format")
        raise UserError(
            f"{name} in {codes.file} is stored in the layout {named} of GPTQ, but only gptq and gptq_v2 are supported; "
            "convert it to one of the two with GPTQModel",
            2,
        )
    rows, words = codes.shape[1], tensors[zero].shape[-1] if tensors[zero].shape else 0
    bits = next((bits for bits in BITS if words == rows * bits // 32), stated.number("bits") or 4)
    columns = codes.shape[0] * 32 // bits
    scales = group_scales(scale, tensors[scale], rows, columns, stated, f"GPTQ with {bits} bits")
    if bits not in BITS or tensors[zero].shape != (scales.grid[-1], rows * bits // 32):
        raise wrong_shape(zero, tensors[zero], (scales.grid[-1], rows * bits // 32), "zero points of 4 or 8 bits")
    check_dtype(zero, tensors[zero], ("I32",), "GPTQ")
    if index not in tensors and stated.settings.get("desc_act") is True:
        raise order_missing(name, codes, index)
    order = column_order(index, tensors[index], columns, scales) if index in tensors else None
    used = [index] if index in tensors else []
    return Quantized(
        name=f"{stem}.weight",
        shape=(rows, columns),
        format=f"GPTQ {format_name(f'INT{bits}', scales, columns)}",
        parts={part: tensors[part] for part in (name, zero, scale, *used)},
        packed=name,
        packing=column_words(bits),
        scales=scales,
        zeros=partial(read_differences, zero_words(bits, FORMATS[variant]), zero, tensors[zero], (rows, scales.grid[-1])),
        order=order,
    )


def check_parts(name: str, codes: StoredTensor, parts: tuple[str, ...], tensors: dict[str, StoredTensor]) -> None:
    """
    Raises:
        UserError: one is missing.
    """
    for part in parts:
        if part not in tensors:
            raise UserError(
                f"{name} in {codes.file} is stored as GPTQ or AWQ, but {part} is missing; "
                "save the checkpoint again with the tool that quantized it",
                2,
            )


def is_awq(codes: StoredTensor, scales: StoredTensor) -> bool:
    """Whether eight rows are packed into a word."""
    return len(scales.shape) == 2 and codes.shape[1] != scales.shape[1] and codes.shape[1] * 8 == scales.shape[1]


def group_scales(name: str, tensor: StoredTensor, rows: int, columns: int, stated: Stated, format: str) -> Scales:
    """Scales ``[groups, rows]``.

    Raises:
        UserError: the number of groups differs from config.json, or the columns cannot be divided into them.
    """
    check_dtype(name, tensor, FLOATS, format)
    said = stated.number("group_size")
    group = columns if said == -1 else said
    groups = -(-columns // group) if group else tensor.shape[0]
    # Single modules may have been quantized with their own settings.
    if len(tensor.shape) == 2 and stated.settings.get("dynamic") and tensor.shape[0]:
        groups = tensor.shape[0]
        group = -(-columns // groups)
    if tensor.shape != (groups, rows) or not groups:
        raise wrong_shape(name, tensor, (groups, rows), f"{format} and group_size {said}")
    return Scales(name, tensor, (1, rows, groups), rows, 1, group or -(-columns // groups), transposed=True)
