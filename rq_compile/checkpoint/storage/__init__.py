"""Storage formats of published checkpoints: one module each, which finds the tensors of a weight and decodes them.

``weights.py`` asks them in turn and shows a checkpoint as if it had never been quantized.
"""
