"""The command line: one click command a module; knows screens, nothing else does."""
