"""The format groups that the kernels read, in the order of plugins/format_groups.h. Nothing here needs Triton or torch.

A group's place is the code of its slots. How its weights are decoded is in ``expert_gemm``.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """``bits`` of a quantized weight; 0: floats, whose dtype is that of x. ``exponents``: scales are exponents of powers of two,
    in a byte, instead of fp32. ``integers``: whether the weights are whole numbers times scales."""

    name: str
    bits: int
    exponents: bool = False
    integers: bool = True

    @property
    def few_bits(self) -> bool:
        """Whether the group has no kernels of its own, but only those of layers with few bits."""
        return 0 < self.bits < 4

    @property
    def tensors(self) -> tuple[str, ...]:
        """What the weights of the group's slots are held in."""
        return (f"{self.name}_packed", f"{self.name}_scales") if self.bits else (f"{self.name}_weights",)


GROUPS = (
    Group("float", 0),
    Group("int8", 8),
    Group("int4", 4),
    Group("mxfp4", 4, exponents=True),
    Group("fp8", 8, integers=False),
    Group("int3", 3),
    Group("int2", 2),
)
# The kernels' arguments, in order.
TENSORS = tuple(name for group in GROUPS for name in group.tensors)
# The formats that may be mixed in a layer with built kernels, a bit for each: integers in blocks that all steps divide. Layers
# with few bits have kernels of their own, so that the others need no registers for them.
_MIXED = {code: group for code, group in enumerate(GROUPS) if group.integers and not group.exponents}
MIXED = sum(1 << code for code, group in _MIXED.items() if not group.few_bits)
FEW_BITS = sum(1 << code for code in _MIXED)


def formats_of(codes: Collection[int]) -> int:
    """``FORMATS`` of the kernels for a layer whose slots are in the groups ``codes``: of those that are built, or a bit for each
    group if none are."""
    bits = sum(1 << code for code in set(codes))
    if bits & ~FEW_BITS or (len(set(codes)) == 1 and bits & MIXED):
        return bits
    return FEW_BITS if bits & ~MIXED else MIXED
