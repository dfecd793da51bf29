"""Whether a model fits into memory: the memory that its calibration takes, from the checkpoint's headers, and what is
available."""

import math
import mmap
import re
import resource
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.calibration.measure import ROWS_AT_ONCE
from rq_compile.calibration.side_by_side import AT_ONCE
from rq_compile.errors import UserError
from rq_compile.processes import on_this_host, world_size
from rq_compile.standalone.limits import free_memory

GIB = 2**30
# Memory for the model's modules without weights, activations and so on, in addition to what the process already holds: 130 MiB
# were measured with samples/olmoe.
PROGRAM = 144 * 2**20
# Up to this many bytes of weights in fp32, a model has so little to compute that running it layer by layer would take longer.
LARGEST_WHOLE = GIB
# Measured: while transformers stacks the experts that a checkpoint has one by one, the weights are held in fp32 twice, beside the
# mapped files.
LOADING = 2.5


@dataclass(frozen=True)
class Way:
    """How the model is run: ``whole``, with all weights held in fp32, or layer by layer, with the hidden states
    ``states_in_memory`` or on disk. ``reason`` is a sentence for the user; ``memory`` is the approximate number of bytes needed
    in addition to what the process already holds."""

    whole: bool
    states_in_memory: bool
    reason: str
    memory: int = field(default=0, compare=False)


def choose_way(model: Model, layers: Sequence[MoeLayer], *, rows: int, limit: int | None, device: str) -> Way:
    """The whole model if it is small and fits into ``limit`` bytes of memory (None: the available memory), otherwise layer by
    layer. In a large model, an expert then runs once, both for the model's output and for its measurement.

    ``rows`` is the number of token rows that the batches have, padding included.

    Raises:
        UserError: there is no such device, or not even one layer at a time fits into the ``limit``.
    """
    device_room = None if device == "cpu" else device_memory(device)
    room = available_memory() if limit is None else limit - used_memory()
    weights = 4 * model.parameter_count
    measuring = PROGRAM + _measuring(layers, rows)
    # Three arrays of hidden states in fp32 and one of outputs in float64; each of several processes has the outputs of all.
    states = (20 if world_size() == 1 else 28) * rows * max(moe.geometry.hidden for moe in layers)
    whole = int(LOADING * weights) + measuring + states // 2
    small = weights <= LARGEST_WHOLE
    if small and whole <= room and world_size() == 1 and (device_room is None or weights + GIB <= device_room):
        return Way(True, True, f"the model runs as a whole, in about {_size(whole)} of memory", whole)
    # While a tensor is read, it is held both as stored and in fp32.
    layer = 6 * largest_dense_part(model) + measuring
    if limit is not None and layer > room:
        raise UserError(
            f"--memory-limit is {_size(limit)}, but a single layer of {model.path} takes {_size(layer + limit - room)} "
            "while it is measured, the program included; give that much",
            2,
        )
    in_memory = layer + states <= room
    there = f"{_size(room)} of memory" if whole > room else f"the memory of {device}"
    place = "" if in_memory else f", {_size(states)} of hidden states on disk"
    if world_size() > 1:
        why = f"{world_size()} processes share its batches and experts"
    elif not small:
        why = f"its weights take {_size(weights)} in fp32"
    else:
        why = f"as a whole it would take {_size(whole)}, more than {there}"
    return Way(False, in_memory, f"the model runs layer by layer{place}: {why}", layer + states * in_memory)


def _measuring(layers: Sequence[MoeLayer], rows: int) -> int:
    """Approximate peak memory of ``measure_layer``: experts as stored and rounded, the input moment and its factors, and some of
    the tokens."""
    return max(
        (4 + 20 * AT_ONCE) * geometry.hidden * (geometry.up_rows + geometry.intermediate)
        + 60 * geometry.hidden**2
        + 24 * min(rows, ROWS_AT_ONCE) * (geometry.hidden + geometry.up_rows)
        for geometry in (layer.geometry for layer in layers)
    )


def largest_dense_part(model: Model) -> int:
    """The largest number of weights, other than routed experts, in a layer, or in a tensor outside of the layers."""
    parts: Counter[str] = Counter()
    for name in model.names:
        number = re.search(r"\.\d+\.", name)
        parts[name[: number.end()] if number else name] += math.prod(model.shape(name))
    return max(parts.values())


def available_memory() -> int:
    """Bytes that this process can still allocate without swapping, according to the machine, its control groups and the process's
    own limit; an equal share of them if several processes of a world run on one machine."""
    return free_memory() // on_this_host()


def device_memory(device: str) -> int:
    """Free bytes of a torch device other than the CPU.

    Raises:
        UserError: torch finds none.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"--device {device} asks for a GPU, but torch {torch.__version__} finds none on this machine; use --device cpu", 2
        )
    return torch.cuda.mem_get_info(device)[0]


def used_memory() -> int:
    """Resident bytes of this process (at its peak, if the system does not report the current number)."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        return int(statistics.read_text(encoding="utf-8").split()[1]) * mmap.PAGESIZE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 10 * GIB else f"{size / 2**20:.0f} MiB"
