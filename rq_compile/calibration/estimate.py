"""Computes relative errors from a layer's measured sums. Experts that too few tokens reached get an estimate."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from rq_compile.quantization.formats import Format

# Measured once on an early samples/olmoe, rounded to the nearest, against the error on all of an expert's pairs (512 or
# more): 16 pairs of it are off by a median factor of 1.3 (95 %: within 3.7), 4 by 2.2 (12), and what its layer's other
# experts suffer by 1.5 (20).
MIN_PAIRS = 16
# The pairs that the other experts' word is worth beside an expert's own: of 2, 4, 8 and 16, the best with 2 to 16 own pairs.
PRIOR_PAIRS = 2


class Sums(Protocol):
    """The common fields of ``LayerMeasurement`` and ``LayerSums``: numbers for each expert, ``[m]``."""

    @property
    def pairs(self) -> Sequence[int] | np.ndarray: ...
    @property
    def energy(self) -> Sequence[float] | np.ndarray: ...
    @property
    def error(self) -> Mapping[Format, Sequence[float] | np.ndarray]: ...
    @property
    def weight_error(self) -> Mapping[Format, Sequence[float] | np.ndarray]: ...
    @property
    def output_square(self) -> float: ...


def relative_errors(sums: Sums, load: np.ndarray) -> tuple[dict[Format, np.ndarray], np.ndarray]:
    """``error[format]`` float64 ``[m]`` as in ``LayerCalibration``, and which experts' errors are estimated, bool ``[m]``.

    ``sums``: those of all tokens. ``load`` int64 ``[m]``: their (token, choice) pairs. An expert that was measured on fewer than
    ``MIN_PAIRS`` pairs is estimated from its own pairs and from ``PRIOR_PAIRS`` assumed ones. The error of an assumed pair,
    relative to the expert's weight error, is that of the pairs of the layer's other experts. If no token came, the load counts as
    1, so that an estimate is 0 only if the format holds the weights exactly.
    """
    pairs, energy = np.asarray(sums.pairs), np.asarray(sums.energy)
    estimated = pairs < MIN_PAIRS
    known = pairs > 0 if estimated.all() else ~estimated
    own = pairs / (pairs + PRIOR_PAIRS)
    errors = {}
    for format, found in sums.error.items():
        measured, changes = np.asarray(found), np.asarray(sums.weight_error[format])
        # An expert whose weights the format cannot hold says nothing about the others.
        held = np.isfinite(changes)
        weight_error = np.where(held, changes, 0)
        units = (weight_error * load)[known].sum()
        suffered = measured[known & held].sum() / units if units > 0 else 0
        if suffered == 0:
            # None of the others changes in this format: assume that the output changes, relatively, about as much as the weights.
            suffered = energy[known].sum() / load[known].sum()
        estimate = own * np.where(held, measured, 0) + (1 - own) * suffered * weight_error * np.maximum(load, 1)
        errors[format] = np.where(held, np.where(estimated, estimate, measured) / sums.output_square, np.inf)
    return errors, estimated
