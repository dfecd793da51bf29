"""Non-expert modules as the planner sees them, and the bytes of a whole engine's weights file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from rq_compile.architectures.geometry import GATED, ExpertGeometry
from rq_compile.calibration.schema import Calibration, DenseCalibration
from rq_compile.errors import UserError
from rq_compile.planning.allocation import LayerChoices
from rq_compile.planning.copies import sequence_of
from rq_compile.planning.schema import PlannedModule, Slot
from rq_compile.planning.targets import TARGETS, Target
from rq_compile.quantization.dense_layout import float_bytes, paged, quantized_bytes
from rq_compile.quantization.formats import SLOT_FORMATS, WORD_BYTES, PackedFormat, PlannedDense, block_size

FORMATS: tuple[PlannedDense, ...] = get_args(PlannedDense)
STORED = 0
PANEL_ROWS = 16


@dataclass(frozen=True)
class DenseItem:
    """A module with the ``size`` (int64 bytes), ``error`` (nats) and ``read`` (bytes per token) of each of ``FORMATS``."""

    calibration: DenseCalibration
    size: np.ndarray
    error: np.ndarray
    read: np.ndarray

    @property
    def choices(self) -> LayerChoices:
        """One expert that has no replicas."""
        return LayerChoices(sequence_of(np.ones(1, np.int64)), np.zeros(1), self.error[None], self.size)

    def scaled(self, factor: float) -> "DenseItem":
        return replace(self, error=self.error * factor)

    def planned(self, format: int) -> PlannedModule:
        known = self.calibration
        return PlannedModule(
            name=known.name,
            kind=known.kind,
            index=known.index,
            matrices=known.matrices,
            format=FORMATS[format],
            bytes=int(self.size[format]),
            bytes_stored=int(self.size[STORED]),
            error=float(self.error[format]),
        )


@dataclass(frozen=True)
class Whole:
    """What an engine with a budget of ``engine_bytes`` holds beside experts: ``modules``, and ``other`` bytes of weights.
    ``spare`` bytes are kept back for the ends of pages."""

    engine_bytes: int
    modules: tuple[DenseItem, ...]
    other: int
    spare: int = 0

    @property
    def budget(self) -> int:
        """Bytes for experts and modules."""
        return self.engine_bytes - self.other - self.spare

    def bytes_of(self, formats: Sequence[int]) -> int:
        return sum(int(item.size[format]) for item, format in zip(self.modules, formats, strict=True))

    def error_of(self, formats: Sequence[int]) -> float:
        return sum(float(item.error[format]) for item, format in zip(self.modules, formats, strict=True))


def check_target_of_whole(target: Target) -> None:
    """
    Raises:
        UserError: engines for the target do not round non-expert weights.
    """
    if TARGETS[target].dense is None:
        those = ", ".join(name for name, known in TARGETS.items() if known.dense is not None)
        raise UserError(f"--engine-bytes is for --target {those}, not for {target}; give --memory instead", 2)


def whole_of(calibration: Calibration, engine_bytes: int, target: Target) -> Whole:
    """
    Raises:
        UserError: the calibration has no measurements of the non-expert weights; or see ``check_target_of_whole``.
    """
    check_target_of_whole(target)
    if not calibration.dense or not calibration.other_weights or any(not layer.stream_share for layer in calibration.layers):
        why = "was made without text" if calibration.data_free else "does not measure the non-expert weights"
        raise UserError(f"--engine-bytes plans the whole model, but the calibration {why}; calibrate again on texts", 2)
    widened = TARGETS[target].dense == "fp32"
    modules = tuple(_item(module, widened) for module in calibration.dense)
    other = calibration.other_weights.fp32 if widened else calibration.other_weights.stored
    return Whole(engine_bytes, modules, other)


def _item(module: DenseCalibration, widened: bool) -> DenseItem:
    size = [
        sum(float_bytes(matrix.rows, matrix.columns, 32 if widened else matrix.bits) for matrix in module.matrices),
        *(sum(quantized_bytes(m.rows, m.columns, format) for m in module.matrices) for format in ("int8", "int4")),
    ]
    error = [0.0, *(module.relative_error(format) for format in ("int8", "int4"))]
    sizes = np.array(size, np.int64)
    # Of an embedding, one row is read for a token.
    read = sizes / module.matrices[0].rows if module.kind == "embedding" else sizes.astype(np.float64)
    return DenseItem(module, sizes, np.array(error), read)


def expert_file_bytes(geometry: ExpertGeometry, slots: Sequence[Slot], *, copied: bool) -> int:
    """Bytes of a layer's slots in the weights file of one process, each tensor filled up to whole pages. Unless ``copied``, slots
    of one expert in one format share their weights."""
    constant = sum(not slot.computed for slot in slots)
    held = [slot for slot in slots if slot.computed]
    stored = held if copied else list({(slot.expert, slot.format): slot for slot in held}.values())
    halves = 2 if geometry.activation in GATED else 1
    total = paged(geometry.expert_bytes("constant") * constant)
    for rows, columns in ((geometry.up_rows, geometry.hidden), (geometry.hidden, geometry.intermediate)):
        parts = halves if rows == geometry.up_rows else 1
        panels = parts * -(-rows // parts // PANEL_ROWS) * PANEL_ROWS
        sizes: dict[str, int] = {}
        for slot in stored:
            format = SLOT_FORMATS[slot.format]
            block = block_size(columns, geometry.block)
            parts_of_slot = [panels * columns * format.bits // 8]
            if isinstance(format, PackedFormat):
                blocks = -(-columns // block)
                parts_of_slot = [panels * blocks * size for size in (WORD_BYTES * format.words(block), format.scale_bytes)]
            for name, size in zip(format.tensors, parts_of_slot, strict=True):
                sizes[name] = sizes.get(name, 0) + size
        total += sum(map(paged, sizes.values()))
        total += paged(4 * rows * len(held)) if geometry.bias else 0
    return total
