"""Modules that import nothing of this package: packages hold copies of them, so that one source text serves both."""
