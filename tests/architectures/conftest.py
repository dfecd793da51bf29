"""Changed copies of checkpoints."""

from changed_checkpoints import copy  # noqa: F401 - a fixture
