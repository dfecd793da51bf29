"""Weights that are used in place: in a shard of the checkpoint that is hard-linked beside the engine.

ONNX Runtime refuses symbolic links that leave the engine's folder, but not hard links. (``onnx.load`` refuses both.) A weight can
be linked if its bytes in the checkpoint are those that the graph needs. Matrices of products get a new layout and norms are fp32,
so little more than the embeddings can be linked, and only those of a 16-bit checkpoint in the native lowering.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from rq_compile.checkpoint.safetensors_file import DTYPES, StoredTensor
from rq_compile.errors import UserError
from rq_compile.file_systems import PART, optional, sync
from rq_compile.quantization.formats import Format
from rq_compile.rewrite.weights import ExternalWeight


def linkable(weight: ExternalWeight, tensor: StoredTensor, *, transposed: bool) -> bool:
    """Whether ``tensor``, as it is or ``transposed``, has the bytes of ``weight``."""
    return not transposed and DTYPES.get(tensor.dtype) == weight.dtype and tensor.shape == weight.shape


def link_names(linked: Mapping[str, StoredTensor], output: Path) -> dict[Path, Path]:
    """Shard -> the link to it beside ``output``, for the shards that hold ``linked`` weights.

    Raises:
        UserError: two shards in different folders have the same name.
    """
    links = {tensor.file: output.with_suffix(f".{tensor.file.name}") for tensor in linked.values()}
    shards = {link: shard for shard, link in links.items()}
    for shard, link in links.items():
        if shards[link] != shard:
            raise UserError(f"{shard} and {shards[link]} would both be linked as {link}; leave --link-weights out", 2)
    return links


@contextmanager
def hard_linked(source: Path, path: Path) -> Iterator[None]:
    """Make ``path`` a hard link of ``source`` if the block succeeds.

    Raises:
        UserError: the two are not on the same file system, or it has no hard links.
    """
    # Use a unique name: a second process that is refused the lock then removes only its own link.
    temporary = path.with_name(f"{PART}{uuid4().hex}")
    try:
        os.link(source.resolve(), temporary)
    except OSError as error:
        raise UserError(
            f"cannot link {source} as {path} ({error.strerror}); leave --link-weights out or choose another output",
            2,
        ) from error
    try:
        yield
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def has_hard_links(folder: Path) -> bool:
    """Whether the file system of ``folder`` has hard links; if not, this is logged."""
    with tempfile.NamedTemporaryFile(prefix=PART, dir=folder) as file:
        link = Path(f"{file.name}.link")
        try:
            with optional("hard-link files", folder):
                os.link(file.name, link)
                link.unlink()
                return True
        except OSError:
            return True  # another error, which linking the weights will report
    return False


def linked_sentence(linked: Iterable[StoredTensor], dense_bytes: int, dtype: Format) -> str:
    """Says what was linked of a checkpoint in ``dtype``, or why nothing could be. ``dense_bytes``: bytes that are written
    instead."""
    size = sum(tensor.bytes for tensor in linked)
    if not size:
        return f"no weight can be linked: the checkpoint ({dtype}) stores none of them as the engine needs it; all are written"
    total = size + dense_bytes
    return f"linked {size / 1e6:.4g} of {total / 1e6:.4g} MB of dense weights; keep the checkpoint as it is"
