"""The format groups that the kernels read, in the order of plugins/format_groups.h. Nothing here needs Triton or torch.

A group's place is the code of its slots. How its weights are decoded is in ``expert_gemm``.
"""

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
    def tensors(self) -> tuple[str, ...]:
        """What the weights of the group's slots are held in."""
        return (f"{self.name}_packed", f"{self.name}_scales") if self.bits else (f"{self.name}_weights",)


GROUPS = (
    Group("float", 0),
    Group("int8", 8),
    Group("int4", 4),
    Group("mxfp4", 4, exponents=True),
    Group("fp8", 8, integers=False),
)
# The kernels' arguments, in order.
TENSORS = tuple(name for group in GROUPS for name in group.tensors)
# The formats that may be mixed in a layer with built kernels, a bit for each: integers in blocks that all steps divide.
MIXED = sum(1 << code for code, group in enumerate(GROUPS) if group.integers and not group.exponents)
