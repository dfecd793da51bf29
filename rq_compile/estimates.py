"""Estimates of a long command before any weight is read: disk space, memory and (roughly) time.

Bytes follow from the config, the headers and the plan, and equal those of the files that are then written. Only the size of the
graph, a small part, is estimated from the numbers of layers, slots and products. Time is the number of operations divided by
``RATES``, which were measured on one machine. ``calibration.run_estimate`` estimates calibration, ``targets.engine_estimate``
compilation.
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
    """Rates of one core of a 2-core virtual machine (AMD EPYC of Zen 4), from ``benchmarks/estimates.py``. Those of another
    machine may well be three times higher or lower."""

    flops: float = 95e9  # fp32 products per second
    gptq: float = 67e6  # weights rounded per second
    nearest: float = 345e6
    read: float = 1e9  # bytes of weights checked and converted per second
    start: float = 10.0  # seconds until the libraries are imported
    export: float = 5.0  # seconds to export one layer


RATES = Rates()


class Estimate(Document):
    """``outputs``: bytes of each file that is written. ``temporary_bytes``: bytes of files in the temporary folder during the
    work. ``memory_bytes``: approximate peak. ``seconds``: rough time on ``cores`` cores of the machine that ``rates``
    describe."""

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
    """The estimate of two stages that run one after the other in one process. The outputs of the first are temporary."""
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
        UserError: the file system of ``output`` has less than ``needed`` bytes free. Files of an interrupted compilation count
            as free.
    """
    partial = output.with_name(f".{output.name}.data.partial")
    folder = next(folder for folder in output.parents if folder.is_dir())  # that of an engine of ranks is made later
    free = shutil.disk_usage(folder).free + (partial.stat().st_blocks * 512 if partial.exists() else 0)
    if free < needed:
        raise UserError(
            f"the engine takes {needed / GIB:.2f} GiB, but {folder} has {free / GIB:.2f} GiB free; "
            "free space or choose another output with -o",
            2,
        )
