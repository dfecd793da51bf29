"""The cost of a step on each target, and therefore the benefit of a replica there.

- *ragged* kernels (``cpu``, ``cuda``, ``tensorrt``) compute exactly the routed rows, whichever slot holds them. On one rank, a
  replica is an alias, and the time depends on the rows and on the bytes that are read.
- *batched* lowerings (``batched``, ``tensorrt-rtx``) make every slot a lane as wide as the busiest slot of its format and
  capacity class, and read the weights of all slots. The busiest slots determine the time.
- With several ranks, the busiest rank determines the time, whatever its kernels. The exchange adds to it: every rank sends each
  row whose slot is elsewhere, and gets its result back. A rank pays for every slot that has rows: it reads the weights and
  converts them to fp32, whichever takes longer, and starts its products. Small steps consist of little else.
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

import numpy as np

from rq_compile.architectures.geometry import ExpertGeometry
from rq_compile.planning.metrics import padded_work, rank_loads
from rq_compile.planning.schema import Slot, stored_bytes
from rq_compile.planning.targets import TARGETS, Target

BYTES_OF_A_NUMBER = 4  # rows are exchanged in fp32
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
    def exchange_known(self) -> bool:
        """Whether the exchange between ranks was measured on this target."""
        return TARGETS[self.target].message_seconds > 0

    @property
    def busiest(self) -> Busiest:
        """What a layer waits for, which is what a replica can relieve."""
        if self.ranks > 1:
            return "rank"
        return "slot" if self.batched else "nothing"

    def bytes_taken(self, geometry: ExpertGeometry, slots: list[Slot]) -> int:
        """Bytes of a layer's experts in an engine, which the memory budget limits. With ragged kernels, copies of an expert with
        the same format and rank are stored once."""
        return sum(geometry.expert_bytes(slot.format) for slot in slots) if self.batched else stored_bytes(geometry, slots)

    def step_time(
        self, geometry: ExpertGeometry, slots: list[Slot], slot_rows: np.ndarray, tokens: int, lanes: np.ndarray
    ) -> float:
        """Seconds of a step of ``tokens`` tokens on the nominal machine, if its rows are distributed like ``slot_rows [S]``.

        The time is that of the slowest rank. A rank computes its rows (padded to its ``lanes [S]`` if batched) and reads its
        weights once. A slot in ``constant`` computes and exchanges no rows.
        """
        machine = TARGETS[self.target]
        share = slot_rows / slot_rows.sum() if slot_rows.any() else np.full(len(slots), 1 / len(slots))
        works = np.array([slot.computed for slot in slots])
        rows = share * tokens * geometry.top_k * works
        touched = self._touched(geometry, slots, share, tokens)
        size = np.array([geometry.expert_bytes(slot.format) for slot in slots], np.float64)
        of_rank = [slot.rank for slot in slots]
        computed = rank_loads(rows, of_rank, self.ranks)
        if self.batched:
            held = np.asarray(of_rank)
            for rank in range(self.ranks):
                mine = held == rank
                if mine.any():
                    computed[rank] *= padded_work(rows[mine], lanes[mine])
        flops = 2 * (geometry.up_rows * geometry.hidden + geometry.hidden * geometry.intermediate)
        read = rank_loads(size * touched, of_rank, self.ranks)
        beyond = rank_loads(self._beyond_reading(geometry, size) * touched * works, of_rank, self.ranks)
        exchange = self._exchange_time(geometry, rank_loads(rows, of_rank, self.ranks))
        return float((computed * flops / machine.flops + read / machine.bytes_per_second + beyond + exchange).max())

    def _exchange_time(self, geometry: ExpertGeometry, rows: np.ndarray) -> np.ndarray:
        """Seconds that each rank, which computes ``rows [R]``, spends on rows that leave or reach it, and on messages.

        Every rank has an equal share of the tokens, and as many of each rank's rows come from every rank.
        """
        machine = TARGETS[self.target]
        arriving = rows * (self.ranks - 1) / self.ranks
        leaving = (rows.sum() - rows) / self.ranks
        row_bytes = 2 * geometry.hidden * BYTES_OF_A_NUMBER  # there and back
        messages = 2 * (self.ranks - 1) + ceil(log2(self.ranks))  # rows there, rows back, and the counts
        return (arriving + leaving) * row_bytes / machine.exchanged_per_second + messages * machine.message_seconds

    def _beyond_reading(self, geometry: ExpertGeometry, size: np.ndarray) -> np.ndarray:
        """Seconds that a slot of ``size [S]`` bytes with rows costs one of several ranks, beside reading it, float ``[S]``."""
        machine = TARGETS[self.target]
        if self.ranks == 1:
            return np.zeros(len(size))
        weights = geometry.up_rows * geometry.hidden + geometry.hidden * geometry.intermediate
        converting = weights / machine.weights_per_second - size / machine.bytes_per_second
        return machine.slot_seconds + np.maximum(0.0, converting)

    def _touched(self, geometry: ExpertGeometry, slots: list[Slot], share: np.ndarray, tokens: int) -> np.ndarray:
        """How often the weights of each slot are expected to be read in a step, float ``[S]``. With ragged kernels, only those of
        slots with rows are read, and copies of an expert with the same format and rank share their weights."""
        if self.batched:
            return np.ones(len(slots))
        first = {(slot.expert, slot.format, slot.rank): place for place, slot in reversed(list(enumerate(slots)))}
        merged = np.zeros(len(slots))
        for place, slot in enumerate(slots):
            merged[first[slot.expert, slot.format, slot.rank]] += share[place]
        return 1 - (1 - np.minimum(1, merged * geometry.top_k)) ** tokens
