"""Packages for a device."""

from edge_packages import batched, compiled, engine, native, packaged  # noqa: F401 - fixtures
