"""What a long command will take, before any weight is read: disk, memory and, roughly, time.

Bytes follow from the config, the headers and the plan, and are those of the files that are then written; the graph's, a small
part, are counted by layers, slots and products. Time is arithmetic divided by ``RATES``, which are one machine's. Calibrating is
estimated in ``calibration.run_estimate``, compiling in ``targets.engine_estimate``.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from rq_compile.errors import UserError
from rq_compile.files import Document, Name

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """Of one core of a 2-core virtual machine (AMD EPYC, AVX-512), by ``benchmarks/estimates.py``. Another machine's may well be
    three times higher or lower."""

    flops: float = 60e9  # fp32 products, a second
    gptq: float = 45e6  # weights rounded, a second
    nearest: float = 240e6
    read: float = 1e9  # bytes of weights, a second, checked and converted
    start: float = 10.0  # seconds until the libraries are imported
    export: float = 5.0  # seconds to export one layer


RATES = Rates()


class Estimate(Document):
    """``outputs``: bytes of each file that is written. ``temporary_bytes``: what files in the temporary folder take meanwhile.
    ``memory_bytes``: about the most that is held. ``seconds``: rough, on ``cores`` cores of the machine that ``rates`` tell."""

    kind: Literal["estimate"] = "estimate"
    outputs: dict[Name, int]
    temporary_bytes: int
    memory_bytes: int
    seconds: float
    cores: int
    rates: dict[str, float] = Field(default=vars(RATES))
    remarks: list[str] = Field(default=[])

    @property
    def output_bytes(self) -> int:
        return sum(self.outputs.values())


def together(first: Estimate, second: Estimate) -> Estimate:
    """Of two stages, one after the other in one process: what the first leaves is temporary."""
    return second.model_copy(
        update={
            "temporary_bytes": max(first.temporary_bytes, second.temporary_bytes),
            "memory_bytes": max(first.memory_bytes, second.memory_bytes),
            "seconds": first.seconds + second.seconds,
            "remarks": [*first.remarks, *second.remarks],
        }
    )


def check_space(output: Path, needed: int) -> None:
    """
    Raises:
        UserError: the file system of ``output`` has less than ``needed`` bytes free; what is left of an interrupted
            compilation counts as free.
    """
    partial = output.with_name(f".{output.name}.data.partial")
    free = shutil.disk_usage(output.parent).free + (partial.stat().st_blocks * 512 if partial.exists() else 0)
    if free < needed:
        raise UserError(
            f"the engine takes {needed / GIB:.2f} GiB, but {output.parent} has {free / GIB:.2f} GiB free; "
            "free space or choose another output with -o",
            2,
        )
