"""The defaults for the amount of text that a calibration runs, and for the length of its sequences."""

from typing import Any

# In all texts together; docs/calibration.md has the measurement.
TOKENS = 32_768
SEQUENCE_LENGTH = 2048
# A batch takes as many sequences as fit into this many tokens, up to BATCH_SIZE.
BATCH_TOKENS = 2048
BATCH_SIZE = 8


def sequence_length_for(text_config: Any) -> int:
    """``SEQUENCE_LENGTH``, or fewer tokens if a model with this transformers config has fewer positions."""
    return min(SEQUENCE_LENGTH, getattr(text_config, "max_position_embeddings", None) or SEQUENCE_LENGTH)


def batch_size_for(sequence_length: int) -> int:
    """The number of sequences in a batch."""
    return max(1, min(BATCH_SIZE, BATCH_TOKENS // sequence_length))
