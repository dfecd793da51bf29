"""From a layer's measured sums to relative errors; experts that too few tokens reached get an estimate."""

import numpy as np

from rq_compile.calibration.measure import LayerMeasurement
from rq_compile.quantization.formats import Format

# Measured once on an early samples/olmoe, rounded to the nearest, against the error on all of an expert's pairs (512 or
# more): 16 pairs of it are off by a median factor of 1.3 (95 %: within 3.7), 4 by 2.2 (12), and what its layer's other
# experts suffer by 1.5 (20).
MIN_PAIRS = 16
# The pairs that the other experts' word is worth beside an expert's own: of 2, 4, 8 and 16, the best with 2 to 16 own pairs.
PRIOR_PAIRS = 2


def relative_errors(measurement: LayerMeasurement, load: np.ndarray) -> tuple[dict[Format, np.ndarray], np.ndarray]:
    """``error[format]`` float64 ``[m]`` as ``LayerCalibration`` has it, and which experts' errors are estimated, bool ``[m]``.

    ``measurement`` is scaled to all tokens, ``load`` int64 ``[m]`` their (token, choice) pairs. An expert that was measured on
    fewer than ``MIN_PAIRS`` is estimated: from its own pairs, and from ``PRIOR_PAIRS`` more that suffer, for each unit of its
    weight error, what a pair of the layer's other experts does for each unit of theirs. Its load counts as 1 where no token
    came, so that an estimate is 0 only where the format holds the weights exactly.
    """
    estimated = measurement.pairs < MIN_PAIRS
    known = measurement.pairs > 0 if estimated.all() else ~estimated
    own = measurement.pairs / (measurement.pairs + PRIOR_PAIRS)
    errors = {}
    for format, measured in measurement.error.items():
        # A format that cannot hold an expert's weights says nothing of the others.
        held = np.isfinite(measurement.weight_error[format])
        weight_error = np.where(held, measurement.weight_error[format], 0)
        units = (weight_error * load)[known].sum()
        suffered = measured[known & held].sum() / units if units > 0 else 0
        if suffered == 0:
            # None of the others changes in this format: an output changes about as much as the weights, relatively.
            suffered = measurement.energy[known].sum() / load[known].sum()
        estimate = own * np.where(held, measured, 0) + (1 - own) * suffered * weight_error * np.maximum(load, 1)
        errors[format] = np.where(held, np.where(estimated, estimate, measured) / measurement.output_square, np.inf)
    return errors, estimated
