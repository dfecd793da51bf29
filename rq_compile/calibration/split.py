"""How several processes share a calibration: each runs some batches, and measures some experts on the tokens of all batches.

Each batch is owned by one process, and only this process holds its hidden states. The recordings of a layer are exchanged batch
by batch, so that every process measures its experts on the same tokens, and in the same order, as a single process would.
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
        """The recording of all batches, on every process, from the recording of its ``own`` batches."""
        if world().size == 1:
            return own
        everything = LayerRecording(own.layer, own.texts)
        for seen in world().all(self.owners, own.seen()):
            everything.add(seen)
        return everything

    @contextmanager
    def all_outputs(self, everything: LayerRecording, own: np.ndarray | None, *, in_memory: bool) -> Iterator[np.ndarray | None]:
        """An array for the experts' outputs for all tokens, float64. At the end, the rows of its own batches are copied to
        ``own``."""
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
        """On the first process, the states that a single process would keep (see ``record_layer_by_layer``); None on the
        others."""
        if world().size == 1 or own is None:
            return own
        every = [{name: list(world().at_first(self.owners, values)) for name, values in stack.items()} for stack in own]
        return every if world().rank == 0 else None

    def own_states(self, every: Any) -> Any:
        """The part of this process from the result of ``all_states`` on the first process."""
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
