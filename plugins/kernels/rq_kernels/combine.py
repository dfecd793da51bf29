"""Combine: the result of a token is the sum of the weighted outputs of its choices, always in the order of the choices."""

import triton
import triton.language as tl


@triton.jit
def combine(y, ids, out, top_k, hidden, experts, COLUMNS: tl.constexpr):
    """``out [T, hidden]`` from ``y [T * top_k, hidden]`` of ``expert_down``, summed in fp32.

    A choice whose id is outside 0..E-1 adds nothing, because its row was not written. Grid: tokens, strips of ``COLUMNS``.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for choice in range(top_k):
        pair = token * top_k + choice
        id = tl.load(ids + pair)
        if id >= 0 and id < experts:
            total += tl.load(y + pair * hidden + column, mask=column < hidden, other=0).to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)
