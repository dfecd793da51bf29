"""Perplexity, agreement with the reference, LIS as measured in the engine."""
