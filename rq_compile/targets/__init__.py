"""Builds an engine for a target, and describes what the engine needs."""
