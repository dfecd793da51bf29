"""The tensors of a checkpoint's folder, wherever they lie: one file, or shards that an index lists."""

import os
import shlex
from pathlib import Path

from rq_compile.checkpoint.folder import file_in, read_json
from rq_compile.checkpoint.safetensors_file import StoredTensor, tensors_of
from rq_compile.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("pytorch_model*.bin", "*.bin", "*.pt")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor by name, from the headers alone: of the shards that the index lists, else of ``model.safetensors``, else of
    every ``.safetensors`` file.

    Raises:
        UserError: there is none, one is missing or damaged (see ``tensors_of``), a tensor is in two files, or the index and
            the headers differ.
    """
    weight_map = _weight_map(folder)
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(folder, weight_map):
        for name, tensor in tensors_of(shard).items():
            if name in tensors:
                raise UserError(f"{name} is in {tensors[name].file} and in {shard}; remove the file that is too many", 2)
            if weight_map is not None and name not in weight_map:
                raise UserError(f"{shard} holds {name}, which {INDEX} does not list; download the checkpoint again", 2)
            tensors[name] = tensor
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            raise UserError(f"{INDEX} lists {name} in {folder / file}, which does not hold it; download the checkpoint again", 2)
        if tensors[name].file != folder / file:
            raise UserError(
                f"{INDEX} lists {name} in {folder / file}, but it is in {tensors[name].file}; download the checkpoint again", 2
            )
    if not tensors:
        raise UserError(f"the .safetensors files of {folder} hold no tensors; download the checkpoint again", 2)
    return tensors


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None where there is no index."""
    index = folder / INDEX
    if not index.exists():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} lists no tensors (weight_map); download it again", 2)
    for name, file in weight_map.items():
        if not name.isprintable() or not isinstance(file, str):
            raise UserError(f"{index} names no file for the tensor {name!r}; download it again", 2)
    return weight_map


def _shards(folder: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is not None:
        shards = [file_in(folder, name) for name in sorted(set(weight_map.values()))]
        for shard in shards:
            if not os.path.exists(shard):  # Path.exists raises where a name is too long
                raise UserError(f"{shard} is missing, though {INDEX} lists it; download it again", 2)
        return shards
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise _no_shards(folder)
    return shards


def _no_shards(folder: Path) -> UserError:
    """Pickled weights run code when they are opened: the way out is a command that lets them hold tensors only."""
    pattern = next((pattern for pattern in PICKLED if any(folder.glob(pattern))), None)
    if pattern is None:
        return UserError(f"{folder} has no .safetensors files; give a checkpoint in that format", 2)
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
