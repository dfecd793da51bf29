"""Recognizes quantized weights in unsupported formats by their tensors, so that none is mistaken for a weight or ignored."""

from pathlib import Path

from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.checkpoint.storage.stated import Stated
from rq_compile.errors import UserError

OTHERWISE = "use the 16-bit checkpoint that it was made from, or one in a format that docs/storage-formats.md lists"
WAY_OUT: dict[str, str] = {
    "bitsandbytes": "load it with transformers, call model.dequantize() and save_pretrained(), or use the original checkpoint",
    "MLX": "convert it to 16 bit with mlx_lm.convert --dequantize, or use the original checkpoint",
}
# Suffix of the names of a format's tensors -> the format.
MARKS: dict[str, str] = {
    ".trellis": "EXL3",
    ".q_weight": "EXL2",
    ".W_q": "HQQ",
    ".weight._data": "quanto",
    ".codebooks": "AQLM",
    ".Qidxs": "QuIP#",
    ".centroids": "VPTQ",
    ".weight_qdata": "torchao",
    ".weight:_data": "torchao",
    ".SCB": "bitsandbytes",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
}
ENDS = tuple(MARKS)
METHODS = {format.lower(): format for format in MARKS.values()}  # quant_method -> the format
CODES = ("I8", "U8", "I16", "U16", "I32", "U32")


def refuse_foreign(tensors: dict[str, StoredTensor]) -> None:
    """
    Raises:
        UserError: a tensor has a name of an unsupported format.
    """
    for name, tensor in tensors.items():
        if name.endswith(ENDS):
            raise _not_read(name, tensor, next(format for end, format in MARKS.items() if name.endswith(end)))
        stem, _, last = name.rpartition(".")
        if tensor.dtype == "U32" and last == "weight" and f"{stem}.scales" in tensors:
            raise _not_read(name, tensor, "MLX")


def refuse_foreign_method(folder: Path, method: str, files: str) -> None:
    """Check the format of weights in pickled ``files``, whose tensors are not read.

    Raises:
        UserError: the ``method`` that the config states belongs to a format that is not supported.
    """
    if method in METHODS:
        format = METHODS[method]
        raise UserError(
            f"{folder} has its weights in {files} files, stored by {format}, a format that is not read; "
            f"{WAY_OUT.get(format, OTHERWISE)}",
            2,
        )


def refuse_codes(tensors: dict[str, StoredTensor], stated: Stated) -> None:
    """For a checkpoint that states a quantization and has no weight in a known format.

    Raises:
        UserError: a tensor is a matrix of integers.
    """
    for name, tensor in tensors.items():
        if stated.named and tensor.dtype in CODES and len(tensor.shape) > 1:
            raise not_read(name, tensor, stated.method or "none")


def not_read(name: str, tensor: StoredTensor, method: str) -> UserError:
    return UserError(
        f"{name} in {tensor.file} is stored as {tensor.dtype} {list(tensor.shape)} in an unsupported format (quant_method "
        f"{method}); {WAY_OUT.get(method, OTHERWISE)}",
        2,
    )


def _not_read(name: str, tensor: StoredTensor, format: str) -> UserError:
    return UserError(f"{name} in {tensor.file} is stored by {format}, an unsupported format; {WAY_OUT.get(format, OTHERWISE)}", 2)
