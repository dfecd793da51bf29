"""Formats: how the weights of a slot are stored, and their cost in bytes and in error."""
