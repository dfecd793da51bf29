"""The targets of a plan and the costs of a step there. This module does not need numpy."""

from dataclasses import dataclass
from typing import Literal

Target = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx", "batched"]


@dataclass(frozen=True)
class Costs:
    """Nominal rates that turn rows and bytes into one unit. A prediction is only ever shown as a ratio of two times.

    ``batched``: every slot is a lane as wide as the busiest slot of its format and capacity class; otherwise, kernels are ragged.
    """

    flops: float
    bytes_per_second: float
    batched: bool = False


TARGETS: dict[Target, Costs] = {
    "cpu": Costs(200e9, 33e9),
    "cuda": Costs(800e12, 3.3e12),
    "tensorrt": Costs(800e12, 3.3e12),
    "tensorrt-rtx": Costs(150e12, 1.0e12, batched=True),
    "batched": Costs(200e9, 33e9, batched=True),
}
