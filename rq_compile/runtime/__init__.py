"""Loads an engine and generates text."""
