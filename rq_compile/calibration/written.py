"""A calibration from texts to files: saved layer by layer while it runs, with its statistics in a file beside it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rq_compile import spill
from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import calibrate
from rq_compile.calibration.coverage import few_tokens
from rq_compile.calibration.schema import Calibration
from rq_compile.calibration.statistics import write_with_statistics
from rq_compile.calibration.unfinished import unfinished
from rq_compile.texts import Text


def calibrated_into(
    output: Path, model: Model, texts: Mapping[str, str | Text], *, fresh: bool, remark: Callable[[str], None], **measuring: Any
) -> Calibration:
    """Calibrate ``model`` on ``texts`` (name to content), write the calibration to ``output`` and return it.

    ``measuring``: the other arguments of ``calibrate``. An interrupted run with the same arguments continues after its last
    finished layer, unless ``fresh``.

    Raises:
        UserError: see ``calibrate`` and ``write_with_statistics``.
    """
    with unfinished(output, fresh=fresh, say=remark) as kept:
        with spill.beside(output):
            calibration, statistics = calibrate(model, texts, remark=remark, kept=kept, **measuring)
        calibration = write_with_statistics(calibration, statistics, output)
    if told := few_tokens(calibration):
        remark(told)
    return calibration
