"""Describes a compiled engine on one HTML page."""
