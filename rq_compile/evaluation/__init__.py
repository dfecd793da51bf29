"""Perplexity, agreement with the reference, and LIS as measured in the engine."""
