"""What modules returned for every batch while a model runs layer by layer."""

import warnings
from typing import Any

import numpy as np
import torch

from rq_compile.calibration.scratch import release, scratch


class States:
    """Hidden states of all batches. A layer may have several streams of them (hyper-connections), so their width may change."""

    def __init__(self, starts: np.ndarray, width: int, in_memory: bool, device: str) -> None:
        self._starts, self._in_memory, self._device = starts, in_memory, device
        self._rows = scratch((int(starts[-1]), width), in_memory)
        self._kept: dict[int, tuple[np.ndarray, torch.Size]] = {}  # batch -> where its states lie, and their shape
        self._read: tuple[int, torch.Tensor] | None = None

    def keep(self, batch: int, hidden: torch.Tensor) -> None:
        start, end = self._starts[batch : batch + 2]
        rows = hidden.reshape(end - start, -1).cpu().numpy()
        if rows.shape[1] != self._rows.shape[1]:
            self._rows = scratch((int(self._starts[-1]), rows.shape[1]), self._in_memory)
        self._rows[start:end] = rows
        release(self._rows)
        self._kept[batch] = (self._rows, hidden.shape)
        self._read = None

    def of(self, batch: int) -> torch.Tensor:
        """``[batch, length, ..., hidden]``"""
        if self._read is None or self._read[0] != batch:
            kept, shape = self._kept[batch]
            rows = torch.tensor(kept[self._starts[batch] : self._starts[batch + 1]], device=self._device)
            release(kept)
            self._read = (batch, rows.reshape(shape))
        return self._read[1]

    def all(self) -> list[torch.Tensor]:
        """The states of every batch, without copies."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the array is mapped read-only
            return [
                torch.from_numpy(kept[self._starts[batch] : self._starts[batch + 1]]).reshape(shape)
                for batch, (kept, shape) in sorted(self._kept.items())
            ]


class Outputs:
    """The outputs of a module whose inputs do not depend on the layer's experts, so that it need not run again when the layer is
    computed. They are held in ``states``."""

    def __init__(self, states: States) -> None:
        self._states = states
        self._beside: dict[int, tuple[None, ...] | None] = {}
        self._again = False

    def keep(self, batch: int, returned: Any) -> None:
        """``returned`` is a tensor, or a tuple of one followed by None, as attention returns it without its weights."""
        hidden, beside = (returned[0], returned[1:]) if isinstance(returned, tuple) else (returned, None)
        usual = isinstance(hidden, torch.Tensor) and hidden.dtype == torch.float32 and all(one is None for one in beside or ())
        self._again |= not usual or batch in self._beside
        if not self._again:
            self._states.keep(batch, hidden)
            self._beside[batch] = beside

    def complete(self, batches: int) -> bool:
        """Whether the module was called once for each batch, and ``of`` can give what it returned."""
        return not self._again and len(self._beside) == batches

    def of(self, batch: int) -> Any:
        hidden, beside = self._states.of(batch), self._beside[batch]
        return hidden if beside is None else (hidden, *beside)
