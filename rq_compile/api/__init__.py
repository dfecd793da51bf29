"""The Python API, ``import rq_compile as rq``: ``open``, ``calibrate``, ``merge``, ``plan``, ``compile`` and ``load``.

Each stage reads and writes the same files as the command of the same name, so a program and the command line can take turns.
Remarks go to the logger ``rq_compile``; nothing is printed. Mistakes of the user raise ``UserError``.
"""

from rq_compile.api.engine import Engine
from rq_compile.api.stages import calibrate, compile, load, merge, open, plan
from rq_compile.errors import UserError
from rq_compile.standalone.sampling import SamplingParams

__all__ = ["Engine", "SamplingParams", "UserError", "calibrate", "compile", "load", "merge", "open", "plan"]
