"""Checks whether a file is the plugin library of ``plugins/tensorrt``, without loading it."""

from pathlib import Path

from rq_compile.errors import UserError

# The file's format, the function that TensorRT calls in it, and the plugin that the network names.
ELF = b"\x7fELF"
CONTAINS = (b"getCreators", b"MoeLayer", b"rq.moe")
README = "plugins/tensorrt/README.md"


def check_library(path: Path) -> None:
    """The library is not loaded, since it may be for a different machine.

    Raises:
        UserError: there is no such file, or it is not a library of these plugins.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the plugin library {path}: {error.strerror}; build it as {README} says", 2) from error
    if not content.startswith(ELF) or any(part not in content for part in CONTAINS):
        raise UserError(f"{path} is not a library of the plugin MoeLayer; build it as {README} says", 2)
