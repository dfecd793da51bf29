"""Storage formats of published checkpoints. Each module finds the tensors of a weight in its format and decodes them.

``weights.py`` tries the formats in turn and presents a checkpoint as if it had never been quantized.
"""
