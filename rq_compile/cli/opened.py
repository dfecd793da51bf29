"""A command's model, opened; what is odd about it is said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rq_compile.cli.screen import Screen

if TYPE_CHECKING:
    from rq_compile.architectures.model import Model


def opened(screen: Screen, folder: Path) -> Model:
    """
    Raises:
        UserError: see ``Model.open``.
    """
    from rq_compile.architectures.model import Model

    model = Model.open(folder)
    for remark in model.remarks:
        screen.note(remark)
    return model
