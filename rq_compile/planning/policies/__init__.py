"""How to choose slots, a policy a module: each has ``Options`` (a closed set with defaults) and ``decide(problem, options)``."""
