"""The targets of a plan and the costs of a step there. This module does not need numpy."""

from dataclasses import dataclass
from math import inf
from typing import Literal

Target = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx", "batched"]


@dataclass(frozen=True)
class Costs:
    """Nominal rates that turn rows and bytes into one unit. A prediction is only ever shown as a ratio of two times.

    ``batched``: every slot is a lane as wide as the busiest slot of its format and capacity class; otherwise, kernels are ragged.
    ``message_seconds`` and ``exchanged_per_second``: what several ranks add to each layer, a time for each message and bytes per
    second of the rows that leave or reach a rank. Only ``cpu`` was measured (benchmarks/exchange.py); others leave them out.
    ``slot_seconds`` and ``weights_per_second``: what each slot with rows costs one of several ranks, a fixed time and, unless
    its bytes take longer to read, a pass that converts its weights to fp32. Only ``cpu`` was measured (benchmarks/slots.py).
    ``few_bits``: whether engines store int3 and int2 in 3 and 2 bits, and not as int4.
    ``dense``: how engines hold non-expert weights that are not rounded, as stored or in fp32; None if they cannot be rounded.
    """

    flops: float
    bytes_per_second: float
    batched: bool = False
    message_seconds: float = 0.0
    exchanged_per_second: float = inf
    slot_seconds: float = 0.0
    weights_per_second: float = inf
    dense: Literal["stored", "fp32"] | None = None
    few_bits: bool = False


TARGETS: dict[Target, Costs] = {
    "cpu": Costs(
        200e9,
        33e9,
        message_seconds=13e-6,
        exchanged_per_second=3.9e9,
        slot_seconds=1.7e-6,
        weights_per_second=25e9,
        dense="stored",
        few_bits=True,
    ),
    "cuda": Costs(800e12, 3.3e12, dense="fp32", few_bits=True),
    "tensorrt": Costs(800e12, 3.3e12, few_bits=True),
    "tensorrt-rtx": Costs(150e12, 1.0e12, batched=True),
    "batched": Costs(200e9, 33e9, batched=True),
}
