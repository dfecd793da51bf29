"""Integers with scales along a row: compressed-tensors' pack-quantized and int-quantized, and ModelOpt's INT4 AWQ and INT8.

pack-quantized: ``weight_packed`` int32 ``[out, ceil(in * bits / 32)]``, ``weight_scale [out, in / group]``, ``weight_shape``; if
asymmetric, also ``weight_zero_point``, packed along ``out``; if columns were ordered by their activations, also
``weight_g_idx [in]``. int-quantized: ``weight`` int8 with ``weight_scale [out, 1]``. ModelOpt: ``weight`` uint8 ``[out / 2, in]``
with two rows per byte, ``weight_scale [out, in / group]`` and ``pre_quant_scale [in]``.
"""

from functools import partial
from math import ceil

import numpy as np

from rq_compile.checkpoint.safetensors_file import StoredTensor, read_tensor
from rq_compile.checkpoint.storage.decoding import read_differences
from rq_compile.checkpoint.storage.four_bit_float import column_scale
from rq_compile.checkpoint.storage.packings import INT8, ROW_PAIRS, offset_words
from rq_compile.checkpoint.storage.quantized import Quantized
from rq_compile.checkpoint.storage.scales import Scales, check_dtype, check_kind, grid_of, in_groups, wrong_shape
from rq_compile.checkpoint.storage.stated import Stated
from rq_compile.errors import UserError

FLOATS = ("F32", "BF16", "F16")
BITS = (4, 8)
ORDERED = ("group", "dynamic", True)  # actorder of compressed-tensors that stores an order of the columns


def claim(name: str, tensors: dict[str, StoredTensor], stated: Stated) -> Quantized | None:
    """The weight whose integers are in ``name``, or None.

    Raises:
        UserError: a part is missing, or its shape or dtype is not that of this format, or not what config.json states.
    """
    codes = tensors[name]
    stem, _, last = name.rpartition(".")
    scale = f"{stem}.weight_scale"
    if last == "weight_packed" and codes.dtype == "I32":
        return _packed(name, stem, tensors, stated)
    if last != "weight" or scale not in tensors or tensors[scale].dtype not in FLOATS or len(codes.shape) < 2:
        return None
    if codes.dtype in ("I8", "U8"):
        check_kind(name, codes, stated.floats(stem), floats=False)
    if codes.dtype == "I8":
        return _int8(name, stem, tensors)
    return _row_pairs(name, stem, tensors) if codes.dtype == "U8" else None


def _packed(name: str, stem: str, tensors: dict[str, StoredTensor], stated: Stated) -> Quantized:
    codes, scale, sizes = tensors[name], f"{stem}.weight_scale", f"{stem}.weight_shape"
    for part in (scale, sizes):
        if part not in tensors:
            raise UserError(
                f"{name} in {codes.file} is pack-quantized, but {part} is missing; "
                "save the checkpoint again with the tool that quantized it",
                2,
            )
    shape = tuple(int(size) for size in read_tensor(sizes, tensors[sizes]).reshape(-1))
    columns = shape[-1] if len(shape) == len(codes.shape) else 0
    said = stated.weights(stem)
    bits = next((bits for bits in BITS if codes.shape == (*shape[:-1], ceil(columns * bits / 32))), None)
    if said.get("num_bits") in BITS and bits is not None:
        # Very narrow matrices have the same number of words with 4 bits as with 8.
        bits = said["num_bits"] if codes.shape[-1] == ceil(columns * said["num_bits"] / 32) else None
    if bits is None or columns < 1:
        raise UserError(
            f"{name} in {codes.file} has shape {list(codes.shape)}, which cannot hold a weight of {list(shape)} (weight_shape) "
            f"with {said.get('num_bits', '4 or 8')} bits; save the checkpoint again with the tool that quantized it",
            2,
        )
    format = f"INT{bits}"
    scales = _grouped(scale, tensors[scale], shape, format, said.get("group_size"))
    parts = [name, scale, sizes]
    zeros = order = None
    zero = f"{stem}.weight_zero_point"
    if zero in tensors:
        zeros, parts = _zeros(zero, tensors[zero], scales, shape[-2], bits), [*parts, zero]
    elif said.get("symmetric") is False:
        raise UserError(
            f"{name} in {codes.file} is asymmetric {format}, but {zero} is missing; "
            "save the checkpoint again with the tool that quantized it",
            2,
        )
    if (index := f"{stem}.weight_g_idx") in tensors:
        order, parts = column_order(index, tensors[index], columns, scales), [*parts, index]
    elif said.get("actorder") in ORDERED:
        raise order_missing(name, codes, index)
    return Quantized(
        name=f"{stem}.weight",
        shape=shape,
        format=format_name(format, scales, columns),
        parts={part: tensors[part] for part in parts},
        packed=name,
        packing=offset_words(bits),
        scales=scales,
        zeros=zeros,
        order=order,
    )


def _int8(name: str, stem: str, tensors: dict[str, StoredTensor]) -> Quantized:
    codes, scale, zero = tensors[name], f"{stem}.weight_scale", f"{stem}.weight_zero_point"
    scales = grid_of(scale, tensors[scale], codes.shape, "INT8")
    parts, zeros = {name: codes, scale: tensors[scale]}, None
    if zero in tensors:
        points = grid_of(zero, tensors[zero], codes.shape, "INT8", dtypes=("I8",))
        if points.width != scales.width:
            raise wrong_shape(zero, tensors[zero], tensors[scale].shape, "zero points, one for each scale")
        parts[zero], zeros = tensors[zero], points.read
    return Quantized(
        name=name,
        shape=codes.shape,
        format=format_name("INT8", scales, codes.shape[-1]),
        parts=parts,
        packed=name,
        packing=INT8,
        scales=scales,
        zeros=zeros,
    )


def _row_pairs(name: str, stem: str, tensors: dict[str, StoredTensor]) -> Quantized:
    codes, scale, before = tensors[name], f"{stem}.weight_scale", f"{stem}.pre_quant_scale"
    shape = (*codes.shape[:-2], 2 * codes.shape[-2], codes.shape[-1])
    scales = _grouped(scale, tensors[scale], shape, "INT4 (ModelOpt AWQ)", None)
    used = [before] if before in tensors else []
    return Quantized(
        name=name,
        shape=shape,
        format=format_name("INT4", scales, shape[-1]),
        parts={part: tensors[part] for part in (name, scale, *used)},
        packed=name,
        packing=ROW_PAIRS,
        scales=scales,
        column_scale=column_scale(before, tensors, shape[-1]),
    )


def _grouped(name: str, tensor: StoredTensor, shape: tuple[int, ...], format: str, stated: object) -> Scales:
    """Scales whose group size follows from their number and must be the ``stated`` one."""
    count = tensor.shape[-1] if len(tensor.shape) == len(shape) else 1
    said = stated if type(stated) is int and stated > 0 else None
    if count <= 1 and (said is None or said >= shape[-1]):
        return grid_of(name, tensor, shape, format)
    group = said or max(1, ceil(shape[-1] / max(1, count)))
    return in_groups(name, tensor, shape, group, format, FLOATS)


def _zeros(name: str, tensor: StoredTensor, scales: Scales, rows: int, bits: int) -> partial[np.ndarray]:
    groups = scales.grid[-1]
    check_dtype(name, tensor, ("I32", "I8"), "a zero point")
    expected = (ceil(rows * bits / 32), groups) if tensor.dtype == "I32" else (rows, groups)
    if tensor.shape != expected:
        raise wrong_shape(name, tensor, expected, f"zero points of {rows} rows")
    packing = offset_words(bits, of_rows=True) if tensor.dtype == "I32" else INT8
    return partial(read_differences, packing, name, tensor, (rows, groups))


def order_missing(name: str, codes: StoredTensor, index: str) -> UserError:
    return UserError(
        f"{name} in {codes.file} has its columns in activation order, but {index}, which holds this order, is missing; "
        "save the checkpoint again with the tool that quantized it",
        2,
    )


def column_order(name: str, tensor: StoredTensor, columns: int, scales: Scales) -> partial[np.ndarray | None]:
    """
    Raises:
        UserError: the tensor does not give a group for each column.
    """
    check_dtype(name, tensor, ("I32", "I64"), "an order of the columns")
    if tensor.shape != (columns,):
        raise wrong_shape(name, tensor, (columns,), "a group for each column")
    return partial(_read_order, name, tensor, scales.width, scales.grid[-1])


def _read_order(name: str, tensor: StoredTensor, group: int, groups: int) -> np.ndarray | None:
    order = read_tensor(name, tensor).astype(np.int64)
    if len(order) and not (order.min() >= 0 and order.max() < groups) and not (order == -1).all():
        raise UserError(f"{name} in {tensor.file} names a group that is not one of {groups}; quantize it again", 2)
    in_turn = (order == np.arange(len(order)) // group).all() or (order == -1).all()
    return None if in_turn else order


def format_name(format: str, scales: Scales, columns: int) -> str:
    return f"{format} per row" if scales.width >= columns else f"{format} group {scales.width}"
