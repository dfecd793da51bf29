"""A session of one rank's graph. All ranks run a step of the engine at the same time, because each computes rows of the others.

A rank without tokens takes part with a step in which it sends no rows.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rq_compile.engine.ranks import IDLE, Ranks, ranks
from rq_compile.errors import UserError
from rq_compile.standalone.decoding import LAST, inputs_of
from rq_compile.standalone.limits import affinity, default_threads

if TYPE_CHECKING:
    from pathlib import Path

    import onnxruntime

    from rq_compile.engine.manifest import Manifest


def met(engine: Path, manifest: Manifest) -> Ranks | None:
    """The processes that run ``engine``, after all have come; None if one process runs it.

    Raises:
        UserError: there are other processes than the engine has ranks, or MPI cannot be used.
    """
    if not manifest.ranks:
        return None
    needed, all_ranks = len(manifest.ranks), ranks()
    if all_ranks.size == 1:
        raise UserError(
            f"{engine} is for {needed} processes, but this one is alone; start it with mpirun -n {needed}, the mpirun of "
            "the MPI that librq_moe_mpi.so was built with",
            2,
        )
    if all_ranks.size != needed:
        all_ranks.part()  # mpirun may lose what was written just before a rank ends the others
        raise UserError(
            f"{engine} is for {needed} processes, but {all_ranks.size} were started; start it with mpirun -n {needed}", 2
        )
    return all_ranks


def threads_of_a_rank(all_ranks: Ranks) -> int:
    """The CPUs of this process, divided by the ranks that may use them too."""
    here = socket.gethostname(), affinity()
    sharing = sum(host == here[0] and not cpus.isdisjoint(here[1]) for host, cpus in all_ranks.gather(here))
    return max(1, default_threads() // sharing)


class RankSession:
    """Has the methods of an ``InferenceSession`` that this package calls. Every rank must call ``run``, ``stand_by`` or ``wait``
    for the same step."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Manifest, all_ranks: Ranks) -> None:
        self._session, self._manifest, self._ranks = session, manifest, all_ranks
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs
        self.get_overridable_initializers, self.io_binding = session.get_overridable_initializers, session.io_binding

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[np.ndarray]:
        self._ranks.any(True)
        return self._session.run(outputs, {**feeds, IDLE: np.zeros(1, np.int64)})

    def run_with_iobinding(self, binding: onnxruntime.IOBinding) -> None:
        self._ranks.any(True)
        binding.bind_cpu_input(IDLE, np.zeros(1, np.int64))
        self._session.run_with_iobinding(binding)

    def stand_by(self, outputs: Sequence[str] = ("logits",)) -> list[np.ndarray] | None:
        """Take part in a step without tokens. None if no rank had any, and so no step was run."""
        if not self._ranks.any(False):
            return None
        inputs = inputs_of(self._session)
        token = {name: np.zeros((1, 1), np.int64) for name in ("input_ids", "position_ids", "decoder_input_ids")}
        feeds = {**token, "attention_mask": np.ones((1, 1), np.int64), "logits_to_keep": np.array([LAST], np.int64)}
        feeds |= {tensor.past: tensor.empty(1) for tensor in self._manifest.cache}
        feeds[IDLE] = np.ones(1, np.int64)
        return self._session.run(list(outputs), {name: value for name, value in feeds.items() if name in inputs})

    def wait(self) -> None:
        """Take part until no rank has tokens left."""
        while self.stand_by() is not None:
            pass
