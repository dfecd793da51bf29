"""AWQ (gemm): ``qweight`` int32 ``[in, out / 8]``, ``qzeros`` int32 ``[groups, out / 8]``, ``scales [groups, out]``.

A word holds eight columns of ``out``, in the order 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits.
"""

from functools import partial

from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.checkpoint.storage.decoding import read_differences
from rq_compile.checkpoint.storage.gptq import check_parts, group_scales, is_awq
from rq_compile.checkpoint.storage.integers import format_name
from rq_compile.checkpoint.storage.packings import AWQ_WORDS
from rq_compile.checkpoint.storage.quantized import Quantized
from rq_compile.checkpoint.storage.scales import check_dtype, wrong_shape
from rq_compile.checkpoint.storage.stated import Stated
from rq_compile.errors import UserError

VERSIONS = ("", "gemm")


def claim(name: str, tensors: dict[str, StoredTensor], stated: Stated) -> Quantized | None:
    """The weight whose ``qweight`` is ``name``, or None.

    Raises:
        UserError: a part is missing, or its shape or dtype is not that of this format, or not what config.json states.
    """
    codes = tensors[name]
    stem, _, last = name.rpartition(".")
    if last != "qweight" or codes.dtype != "I32" or len(codes.shape) != 2:
        return None
    zero, scale = f"{stem}.qzeros", f"{stem}.scales"
    check_parts(name, codes, (zero, scale), tensors)
    version = stated.text("version")
    if stated.method == "awq" and version not in VERSIONS:
        raise UserError(
            f"{name} in {codes.file} is stored in AWQ's layout {version}, but only gemm is supported; save it as gemm", 2
        )
    if not is_awq(codes, tensors[scale]):
        return None
    columns, rows = codes.shape[0], codes.shape[1] * 8
    scales = group_scales(scale, tensors[scale], rows, columns, stated, "AWQ")
    check_dtype(zero, tensors[zero], ("I32",), "AWQ")
    if tensors[zero].shape != (scales.grid[-1], rows // 8):
        raise wrong_shape(zero, tensors[zero], (scales.grid[-1], rows // 8), "AWQ's zero points")
    return Quantized(
        name=f"{stem}.weight",
        shape=(rows, columns),
        format=f"AWQ {format_name('INT4', scales, columns)}",
        parts={part: tensors[part] for part in (name, zero, scale)},
        packed=name,
        packing=AWQ_WORDS,
        scales=scales,
        zeros=partial(read_differences, AWQ_WORDS, zero, tensors[zero], (rows, scales.grid[-1])),
    )
