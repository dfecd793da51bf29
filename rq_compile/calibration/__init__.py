"""Runs the model over text and measures loads, importance and activation statistics."""
