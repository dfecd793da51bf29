"""The tensors of a checkpoint's folder, from one file or from shards that an index lists."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from rq_compile.checkpoint.folder import file_in, read_json
from rq_compile.checkpoint.safetensors_file import StoredTensor, tensors_of
from rq_compile.checkpoint.storage.foreign import refuse_foreign_method
from rq_compile.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth")
# Files that `calibrate` writes have only such tensors.
STATISTICS = (".input_moment", ".intermediate_moment", ".weighted_output", ".squared_gates")


@dataclass(frozen=True)
class Shards:
    """``tensors``: by name. ``absent``: tensors that the index lists but no file holds -> the file that the index names for them.
    ``remarks``: sentences about anything unusual in the files."""

    tensors: dict[str, StoredTensor]
    absent: dict[str, str]
    remarks: tuple[str, ...]


def stored_tensors(folder: Path, method: str = "") -> Shards:
    """Every tensor, from the headers alone: those of ``model.safetensors`` as in transformers, otherwise of the shards that the
    index lists, otherwise of every ``.safetensors`` file. ``method``: the quantization that the config states.

    Raises:
        UserError: there are no files, one is damaged (see ``tensors_of``), or a tensor is in two files.
    """
    remarks: list[str] = []
    weight_map = _weight_map(folder)
    if weight_map is not None and (folder / SINGLE).exists() and SINGLE not in weight_map.values():
        there = sum(os.path.exists(file_in(folder, file)) for file in set(weight_map.values()))
        what = f"lists {there} other files, which are left out" if there else "was not written with it: its files are missing"
        remarks.append(f"the weights are read from {SINGLE}; {INDEX} {what}")
        weight_map = None
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(folder, weight_map, method):
        for name, tensor in tensors_of(shard).items():
            if name in tensors:
                raise UserError(f"{name} is in {tensors[name].file} and in {shard}; remove one of the two files", 2)
            tensors[name] = tensor
    if not tensors:
        raise UserError(f"the .safetensors files of {folder} hold no tensors; give the folder that holds the weights", 2)
    absent = {name: file for name, file in (weight_map or {}).items() if name not in tensors}
    if weight_map is not None:
        files = {name: folder / name for name in set(weight_map.values())}
        elsewhere = [name for name, tensor in tensors.items() if tensor.file != files.get(weight_map.get(name, ""))]
        if elsewhere:
            remarks.append(f"{INDEX} does not say where {_some(elsewhere)} {'is' if len(elsewhere) == 1 else 'are'}")
    return Shards(tensors, absent, tuple(remarks))


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None if there is no index."""
    index = folder / INDEX
    if not index.exists():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} lists no tensors (weight_map); use the index that belongs to these shards, or remove it", 2)
    for name, file in weight_map.items():
        if not name.isprintable() or not isinstance(file, str):
            raise UserError(f"{index} names no file for the tensor {name!r}; use the index that belongs to these shards", 2)
    return weight_map


def _shards(folder: Path, weight_map: dict[str, str] | None, method: str) -> list[Path]:
    if weight_map is not None:
        # A missing shard may hold only tensors that no parameter needs.
        named = [file_in(folder, name) for name in sorted(set(weight_map.values()))]
        shards = [shard for shard in named if os.path.exists(shard)]  # Path.exists raises if a name is too long
        if not shards:
            raise UserError(f"{named[0]} is missing, as are all files that {INDEX} lists; copy the shards into {folder}", 2)
        return shards
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    # Hidden files are not weights. macOS writes `._name` beside a file on foreign file systems.
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(".")]
    shards = [file for file in files if not _is_statistics(file)]
    if not shards:
        raise _no_shards(folder, method)
    return shards


def _is_statistics(file: Path) -> bool:
    names = tensors_of(file)
    return bool(names) and all(name.endswith(STATISTICS) for name in names)


def _no_shards(folder: Path, method: str) -> UserError:
    """Opening pickled weights can run code. The way out is a command that only accepts tensors."""
    pattern = next((pattern for pattern in PICKLED if any(folder.glob(pattern))), None)
    if pattern is None:
        return UserError(f"{folder} has no .safetensors files; give a checkpoint in that format", 2)
    refuse_foreign_method(folder, method, pattern)
    code = (
        "import pathlib, torch, huggingface_hub; "
        f"d = pathlib.Path({str(folder)!r}); "
        "load = lambda f: torch.load(f, map_location='cpu', mmap=True, weights_only=True); "
        f"tensors = {{n: t for f in sorted(d.glob({pattern!r})) for n, t in load(f).items()}}; "
        "huggingface_hub.save_torch_state_dict(tensors, d)"
    )
    return UserError(
        f"{folder} has its weights in {pattern} files, which are pickled and never opened here; "
        f"convert them with python -c {shlex.quote(code)}",
        2,
    )
