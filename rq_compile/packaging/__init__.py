"""What it takes to deploy an engine: one module a destination, each with a function ``package``."""
