"""Tiny checkpoints, built once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_checkpoint(family)`` is the directory of that family's tiny checkpoint; do not write to it."""
    root = tmp_path_factory.mktemp("tiny")
    built: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in built:
            built[family] = tiny.build(family, root / family)
        return built[family]

    return build
