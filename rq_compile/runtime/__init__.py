"""Load an engine and generate text."""
