"""MXFP4 as GPT-OSS is published.

``X_blocks`` uint8 ``[experts, out, in / 32, 16]`` are pairs of float4_e2m1, the even column in the low four bits; ``X_scales``
uint8 ``[experts, out, in / 32]`` are exponents. In 16 bit the same family stores ``X [experts, in, out]``.
"""

from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.checkpoint.storage.packings import E2M1_PAIRS
from rq_compile.checkpoint.storage.quantized import Quantized
from rq_compile.checkpoint.storage.scales import EXPONENTS, check_dtype, in_groups, wrong_shape
from rq_compile.checkpoint.storage.stated import Stated
from rq_compile.errors import UserError

GROUP = 32
BLOCKS, SCALES = "_blocks", "_scales"


def claim(name: str, tensors: dict[str, StoredTensor], stated: Stated) -> Quantized | None:
    """The weight whose blocks ``name`` is, or None.

    Raises:
        UserError: the scales are missing, or a shape or dtype is not that of this format.
    """
    blocks = tensors[name]
    if not name.endswith(BLOCKS) or len(blocks.shape) != 4:
        return None
    stem = name.removesuffix(BLOCKS)
    scale = stem + SCALES
    if scale not in tensors:
        raise UserError(
            f"{name} in {blocks.file} is stored as MXFP4, but its scales {scale} are missing; "
            "save the checkpoint again with the tool that quantized it",
            2,
        )
    check_dtype(name, blocks, ("U8",), "MXFP4")
    experts, rows, groups, packed = blocks.shape
    if packed != GROUP // 2:
        raise wrong_shape(name, blocks, (experts, rows, groups, GROUP // 2), "MXFP4 blocks")
    columns = groups * GROUP
    return Quantized(
        name=stem,
        shape=(experts, columns, rows),
        format="MXFP4",
        parts={name: blocks, scale: tensors[scale]},
        transposed=True,
        packed=name,
        packing=E2M1_PAIRS,
        scales=in_groups(scale, tensors[scale], (experts, rows, columns), GROUP, "MXFP4", EXPONENTS),
    )
