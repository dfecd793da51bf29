"""What a step costs on each target, and therefore what a replica buys there.

- *ragged* kernels (``cpu``, ``cuda``, ``tensorrt``) compute exactly the rows that were routed, whoever holds them: on one rank a
  replica is an alias, and time follows the rows and the bytes that are read.
- *batched* lowerings (``batched``, ``tensorrt-rtx``) make every slot a lane as wide as the busiest slot of its format and
  capacity class and read the weights of all slots: the busiest slots set the time.
- with several ranks the busiest rank sets the time, whatever its kernels.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.planning.metrics import padded_work, rank_loads
from rq_compile.planning.schema import Slot
from rq_compile.planning.targets import TARGETS, Target

Busiest = Literal["slot", "rank", "nothing"]


@dataclass(frozen=True)
class CostModel:
    """The cost of one MoE layer on ``target`` with its slots on ``ranks`` devices."""

    target: Target
    ranks: int

    @property
    def batched(self) -> bool:
        return TARGETS[self.target].batched

    @property
    def busiest(self) -> Busiest:
        """Whose load a layer waits for: what a replica can relieve."""
        if self.ranks > 1:
            return "rank"
        return "slot" if self.batched else "nothing"

    def step_time(
        self, geometry: ExpertGeometry, slots: list[Slot], slot_rows: np.ndarray, tokens: int, lanes: np.ndarray
    ) -> float:
        """Seconds of a step of ``tokens`` tokens on the nominal machine, whose rows are spread like ``slot_rows [S]``.

        The slowest rank counts; a rank computes its rows (padded to its ``lanes [S]`` if batched) and reads its weights once.
        """
        machine = TARGETS[self.target]
        share = slot_rows / slot_rows.sum() if slot_rows.any() else np.full(len(slots), 1 / len(slots))
        rows = share * tokens * geometry.top_k
        bytes_read = self._bytes_read(geometry, slots, share, tokens)
        of_rank = [slot.rank for slot in slots]
        computed = rank_loads(rows, of_rank, self.ranks)
        if self.batched:
            held = np.asarray(of_rank)
            for rank in range(self.ranks):
                mine = held == rank
                if mine.any():
                    computed[rank] *= padded_work(rows[mine], lanes[mine])
        flops = 2 * (geometry.up_rows * geometry.hidden + geometry.hidden * geometry.intermediate)
        read = rank_loads(bytes_read, of_rank, self.ranks)
        return float((computed * flops / machine.flops + read / machine.bytes_per_second).max())

    def _bytes_read(self, geometry: ExpertGeometry, slots: list[Slot], share: np.ndarray, tokens: int) -> np.ndarray:
        """Expected bytes each slot reads, float ``[S]``; copies of equal format on one rank are one set of weights if ragged."""
        size = np.array([geometry.expert_bytes(slot.format) for slot in slots], np.float64)
        if self.batched:
            return size
        first = {(slot.expert, slot.format, slot.rank): place for place, slot in reversed(list(enumerate(slots)))}
        merged = np.zeros(len(slots))
        for place, slot in enumerate(slots):
            merged[first[slot.expert, slot.format, slot.rank]] += share[place]
        touched = 1 - (1 - np.minimum(1, merged * geometry.top_k)) ** tokens
        return size * touched
