"""How to choose slots, one policy per module. Each has ``Options`` (a closed set with defaults) and ``decide(problem,
options)``."""
