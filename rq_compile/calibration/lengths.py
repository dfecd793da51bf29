"""How much text a calibration runs, and in which sequences, where the user does not say."""

from typing import Any

# In all texts together; docs/calibration.md has the measurement.
TOKENS = 32_768
SEQUENCE_LENGTH = 2048
# Of a batch, which takes as many sequences as fit, up to BATCH_SIZE.
BATCH_TOKENS = 2048
BATCH_SIZE = 8


def sequence_length_for(text_config: Any) -> int:
    """``SEQUENCE_LENGTH`` tokens, or as many as a model with this transformers config has positions."""
    return min(SEQUENCE_LENGTH, getattr(text_config, "max_position_embeddings", None) or SEQUENCE_LENGTH)


def batch_size_for(sequence_length: int) -> int:
    """Sequences of a batch."""
    return max(1, min(BATCH_SIZE, BATCH_TOKENS // sequence_length))
