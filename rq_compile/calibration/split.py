"""How several processes share a calibration: each runs some batches, and measures some experts on the tokens of all.

A batch is owned by one process, which alone holds its hidden states. What a layer saw is exchanged, batch by batch, so that every
process measures its experts on the same tokens, in the same order, as a single process would.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from rq_compile.calibration.recording import LayerRecording
from rq_compile.calibration.scratch import release, scratch
from rq_compile.calibration.text import Batch
from rq_compile.processes import world


@dataclass(frozen=True)
class Split:
    """``owners[b]`` is the rank of the process that runs batch b."""

    owners: list[int]

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> "Split":
        return cls(world().owners(batch.decoder.real.size for batch in batches))

    def own(self, batches: Sequence[Batch]) -> list[Batch]:
        return list(world().own(self.owners, batches))

    def all_of(self, own: LayerRecording) -> LayerRecording:
        """The recording of all batches, on every process, of one of its ``own``."""
        if world().size == 1:
            return own
        everything = LayerRecording(own.layer, own.texts)
        for seen in world().all(self.owners, own.seen()):
            everything.add(seen)
        return everything

    @contextmanager
    def all_outputs(self, everything: LayerRecording, own: np.ndarray | None, *, in_memory: bool) -> Iterator[np.ndarray | None]:
        """Where the experts' outputs for all tokens go, float64; those of ``own`` batches are then put there."""
        if world().size == 1 or own is None:
            yield own
            return
        outputs = scratch((everything.tokens, own.shape[1]), in_memory, np.float64)
        yield outputs
        start, end = 0, 0
        for owner, seen in zip(self.owners, everything.batches, strict=True):
            if owner == world().rank:
                own[start : start + seen.tokens] = outputs[end : end + seen.tokens]
                start += seen.tokens
            end += seen.tokens
        release(outputs)
        release(own)

    def all_states(self, own: Any) -> Any:
        """What a single process would have kept (see ``record_layer_by_layer``), on the first process; None on the others."""
        if world().size == 1 or own is None:
            return own
        every = [{name: list(world().at_first(self.owners, values)) for name, values in stack.items()} for stack in own]
        return every if world().rank == 0 else None

    def own_states(self, every: Any) -> Any:
        """Of what ``all_states`` gave to the first process, the part of this process."""
        if world().size == 1:
            return every
        stacks = world().from_first([list(stack) for stack in every] if every is not None else None)
        if stacks is None:
            return None
        at_first = [0] * len(self.owners)
        return [
            {
                name: list(world().own(self.owners, world().all(at_first, every[number][name] if every is not None else ())))
                for name in names
            }
            for number, names in enumerate(stacks)
        ]
