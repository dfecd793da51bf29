"""Build an engine for a target, and say what it needs."""
