"""Packages for deployment: one module per destination, each with a function ``package``."""
