"""ExpertGemm: all slots of a layer in one launch, with any format for each slot.

A program takes one row tile (rows of one slot, from Dispatch) and a strip of outputs. It computes ``W @ x^T``. The weights are
the left operand, which tensor cores read from registers, where the weights are unpacked. The few rows of a decode step are the
short side.

Quantized weights are multiplied by x as integers, which are exact in fp16 and bf16. The scale is applied to each step's sum, not
to each weight. Weights are therefore never rounded a second time, and the scales cost one multiply-add per output and step.
"""

import triton
import triton.language as tl

from rq_kernels.activations import gated, plain
from rq_kernels.formats import GROUPS

FLOAT, INT8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MXFP4, FP8 = tl.constexpr(3), tl.constexpr(4)
INT3, INT2 = tl.constexpr(5), tl.constexpr(6)


@triton.constexpr_function
def _bits(format):
    return GROUPS[format].bits


@triton.constexpr_function
def _bytes_at_once(format, columns):
    """Bytes of ``columns`` weights that follow each other: all of them, or if weights have 3 bits, those with the upper bits."""
    return columns // 8 * (1 if GROUPS[format].bits == 3 else GROUPS[format].bits)


@triton.jit
def _whole_numbers(packed, ZERO: tl.constexpr, dtype: tl.constexpr):
    """``packed - ZERO`` in ``dtype``, through the mantissa of a float, because conversions of integers are slow."""
    if dtype == tl.float16:
        return (packed.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + ZERO)
    else:
        return ((packed.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)).to(dtype)


@triton.jit
def _e2m1_doubled(code, dtype: tl.constexpr):
    """Twice the float4_e2m1 number of each code, a whole number from -12 to 12."""
    mantissa, exponent = code & 1, code >> 1 & 3
    magnitude = tl.where(exponent == 0, mantissa, (mantissa | 2) << exponent >> 1)
    return _whole_numbers(tl.where(code & 8 != 0, 12 - magnitude, 12 + magnitude), 12, dtype)


@triton.jit
def _e4m3(code, dtype: tl.constexpr):
    """The float8_e4m3fn number of each code. Its bits, moved to those of fp16, are 2^-8 times the number."""
    bits = (code & 127).to(tl.uint16) << 7 | (code & 128).to(tl.uint16) << 8
    return (bits.to(tl.float16, bitcast=True) * 256.0).to(dtype)


@triton.jit
def _scales(at, mask, FORMAT: tl.constexpr):
    """fp32 scales; those of MXFP4 are exponents of powers of two, and its numbers are doubled."""
    stored = tl.load(at, mask=mask, other=0)
    if FORMAT == MXFP4:
        return (stored.to(tl.uint32) << 23).to(tl.float32, bitcast=True) * 0.5
    else:
        return stored


@triton.jit
def _split(codes, BITS: tl.constexpr):
    """``[OUTPUTS, 2 * n]`` from ``[OUTPUTS, n]``: each number, then its bits from ``BITS`` on."""
    return tl.join(codes, codes >> BITS).reshape(codes.shape[0], 2 * codes.shape[1])


@triton.jit
def _weights(packed, n, mask, start, block, stride, FORMAT: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """Integers ``[OUTPUTS, COLUMNS]`` of the rows ``n``, from column ``start`` on. A row has ``stride`` bytes."""
    if FORMAT == INT8:
        byte = start + tl.arange(0, COLUMNS)
        q = tl.load(packed + n[:, None] * stride + byte[None, :], mask=mask[:, None], other=128)
        return _whole_numbers(q, 128, dtype)
    elif FORMAT == FP8:
        byte = start + tl.arange(0, COLUMNS)
        code = tl.load(packed + n[:, None] * stride + byte[None, :], mask=mask[:, None], other=0)
        return _e4m3(code, dtype)
    elif FORMAT == MXFP4:
        byte = start // 2 + tl.arange(0, COLUMNS // 2)
        q = tl.load(packed + n[:, None] * stride + byte[None, :], mask=mask[:, None], other=0)
        low, high = _e2m1_doubled(q & 15, dtype), _e2m1_doubled(q >> 4, dtype)
        return tl.join(low, high).reshape(q.shape[0], COLUMNS)
    elif FORMAT == INT3:
        # Eight columns take 24 bits. A block holds the lower 16 bits of all its eights, then the upper 8.
        EIGHTS: tl.constexpr = COLUMNS // 8
        eight, row, before = tl.arange(0, EIGHTS)[None, :], packed + n[:, None] * stride, start // block * block
        lower = tl.multiple_of((2 * start + before) // 16, EIGHTS // 2) + eight
        upper = tl.multiple_of((start + 2 * before + 2 * block) // 8, EIGHTS) + eight
        q = tl.load(row.to(tl.pointer_type(tl.uint16)) + lower, mask=mask[:, None], other=0x4924).to(tl.uint32)
        q |= tl.load(row + upper, mask=mask[:, None], other=0x92).to(tl.uint32) << 16
        return _whole_numbers(_split(_split(_split(q, 12), 6), 3) & 7, 4, dtype)
    elif FORMAT == INT2:
        byte = start // 4 + tl.arange(0, COLUMNS // 4)
        q = tl.load(packed + n[:, None] * stride + byte[None, :], mask=mask[:, None], other=0xAA)
        return _whole_numbers(_split(_split(q, 4), 2) & 3, 2, dtype)
    else:
        byte = start // 2 + tl.arange(0, COLUMNS // 2)
        q = tl.load(packed + n[:, None] * stride + byte[None, :], mask=mask[:, None], other=0x88)
        low, high = _whole_numbers(q & 15, 8, dtype), _whole_numbers(q >> 4, 8, dtype)
        return tl.join(low, high).reshape(q.shape[0], COLUMNS)


@triton.jit
def _float_products(x, present, weights, matrix, n, mask, outputs, columns, GATED: tl.constexpr, COLUMNS: tl.constexpr):
    all_outputs = outputs * (2 if GATED else 1)
    weights += matrix * all_outputs * columns
    first = tl.zeros([n.shape[0], present.shape[0]], tl.float32)
    second = first
    for start in range(0, columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        here = k < columns
        tile = tl.load(x[None, :] + k[:, None], mask=present[None, :] & here[:, None], other=0)
        at = weights + n[:, None] * columns + k[None, :]
        inside = mask[:, None] & here[None, :]
        first = tl.dot(tl.load(at, mask=inside, other=0), tile, first)
        if GATED:
            second = tl.dot(tl.load(at + outputs * columns, mask=inside, other=0), tile, second)
    return first, second


@triton.jit
def _quantized_products(
    x, present, packed, scales, matrix, n, mask, outputs, columns,
    block, FORMAT: tl.constexpr, GATED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    blocks = (columns + block - 1) // block
    # Steps divide a block, so a step has one scale. Rows begin at addresses that can be read 16 bytes at a time.
    stride = tl.multiple_of(blocks * block * _bits(FORMAT) // 8, _bytes_at_once(FORMAT, STEP))
    all_outputs = outputs * (2 if GATED else 1)
    packed += matrix * all_outputs * stride
    scales += matrix * all_outputs * blocks
    first = tl.zeros([n.shape[0], present.shape[0]], tl.float32)
    second = first
    for start in range(0, columns, STEP):
        k = start + tl.arange(0, STEP)
        tile = tl.load(x[None, :] + k[:, None], mask=present[None, :] & (k < columns)[:, None], other=0)
        at = scales + n * blocks + start // block
        sums = tl.dot(_weights(packed, n, mask, start, block, stride, FORMAT, STEP, dtype), tile)
        first += sums * _scales(at, mask, FORMAT)[:, None]
        if GATED:
            sums = tl.dot(_weights(packed, outputs + n, mask, start, block, stride, FORMAT, STEP, dtype), tile)
            second += sums * _scales(at + outputs * blocks, mask, FORMAT)[:, None]
    return first, second


@triton.jit
def _products(
    x, present, slot, n, mask, outputs, columns, formats, weights, float_weights, packed, scales, bias, biased, block,
    FORMATS: tl.constexpr, GATED: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """fp32 ``[OUTPUTS, ROWS]``, and a second one with the weights' second half if ``GATED``.

    x: pointers [ROWS] to the rows, of which those ``present`` are read. ``FORMATS``: a bit for each format that a slot may have.
    ``packed``, ``scales``: those of every format but the first. ``block`` columns share a scale; it is a multiple of ``STEP``.
    """
    format = tl.load(formats + slot)
    matrix = tl.load(weights + slot).to(tl.int64)
    first = tl.zeros([n.shape[0], present.shape[0]], tl.float32)
    second = first
    # Nested, because the outer conditions are evaluated when the kernel is compiled.
    if FORMATS & 1:  # noqa: SIM102
        if format == FLOAT:
            first, second = _float_products(x, present, float_weights, matrix, n, mask, outputs, columns, GATED, COLUMNS)
    for code in tl.static_range(1, len(packed) + 1):
        if FORMATS >> code & 1:  # noqa: SIM102
            if format == code:
                first, second = _quantized_products(
                    x, present, packed[code - 1], scales[code - 1], matrix, n, mask, outputs, columns, block, code, GATED, STEP
                )
    at = bias + slot * outputs * (2 if GATED else 1) + n
    mask = n < outputs * biased  # 1 or 0
    first += tl.load(at, mask=mask, other=0)[:, None]
    if GATED:
        second += tl.load(at + outputs, mask=mask, other=0)[:, None]
    return first, second


@triton.jit
def expert_up(
    x, rows, tiles, tile_count, formats, weights,
    float_weights, int8_packed, int8_scales, int4_packed, int4_scales, mxfp4_packed, mxfp4_scales,
    fp8_packed, fp8_scales, int3_packed, int3_scales, int2_packed, int2_scales, bias, y,
    top_k, columns, outputs, biased, block, activation, alpha, limit,
    FORMATS: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """``y [pairs, outputs]``: row i is the activation of ``x[rows[i] / top_k] @ W^T + bias``. Grid: row tiles, output strips."""
    if tl.program_id(0) >= tl.load(tile_count):
        return
    tile = tiles + 3 * tl.program_id(0)
    slot, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row = begin + tl.arange(0, ROWS)
    present = row < end
    token = tl.load(rows + row, mask=present, other=0) // top_k
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = n < outputs
    first, second = _products(
        x + token.to(tl.int64) * columns, present, slot, n, mask, outputs, columns, formats, weights,
        float_weights,
        (int8_packed, int4_packed, mxfp4_packed, fp8_packed, int3_packed, int2_packed),
        (int8_scales, int4_scales, mxfp4_scales, fp8_scales, int3_scales, int2_scales),
        bias, biased, block,
        FORMATS, GATED, COLUMNS, STEP,
    )  # fmt: skip
    first = gated(first, second, activation, alpha, limit) if GATED else plain(first, activation)
    at = y + row.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(at, tl.trans(first).to(y.dtype.element_ty), mask=present[:, None] & mask[None, :])


@triton.jit
def expert_down(
    x, rows, gates, tiles, tile_count, formats, weights,
    float_weights, int8_packed, int8_scales, int4_packed, int4_scales, mxfp4_packed, mxfp4_scales,
    fp8_packed, fp8_scales, int3_packed, int3_scales, int2_packed, int2_scales, bias, y,
    columns, outputs, biased, block,
    FORMATS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """``y [pairs, outputs]``: row ``rows[i]`` is ``gates[rows[i]] * (x[i] @ W^T + bias)``. Grid: row tiles, output strips."""
    if tl.program_id(0) >= tl.load(tile_count):
        return
    tile = tiles + 3 * tl.program_id(0)
    slot, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row = begin + tl.arange(0, ROWS)
    present = row < end
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = n < outputs
    products, _ = _products(
        x + row.to(tl.int64) * columns, present, slot, n, mask, outputs, columns, formats, weights,
        float_weights,
        (int8_packed, int4_packed, mxfp4_packed, fp8_packed, int3_packed, int2_packed),
        (int8_scales, int4_scales, mxfp4_scales, fp8_scales, int3_scales, int2_scales),
        bias, biased, block,
        FORMATS, False, COLUMNS, STEP,
    )  # fmt: skip
    pair = tl.load(rows + row, mask=present, other=0)
    gate = tl.load(gates + pair, mask=present, other=0)
    at = y + pair.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(at, (tl.trans(products) * gate[:, None]).to(y.dtype.element_ty), mask=present[:, None] & mask[None, :])
