"""Formats: how the weights of a slot are stored, what they cost in bytes and in error."""
