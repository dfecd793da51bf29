"""rq-compile: ahead-of-time compilation of sparse Mixture-of-Experts models.

import rq_compile as rq

rq.calibrate("samples/olmoe", "text.txt", "calibration.json")
rq.plan("calibration.json", "plan.json", memory=0.6)
rq.compile("samples/olmoe", "plan.json", "olmoe.onnx")
print("".join(rq.load("olmoe.onnx").stream("And the LORD said unto")))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rq_compile.api import Engine, SamplingParams, calibrate, compile, load, merge, open, plan
    from rq_compile.errors import UserError

__all__ = ["Engine", "SamplingParams", "UserError", "calibrate", "compile", "load", "merge", "open", "plan"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is used, so that importing the package is fast and needs no other packages."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rq_compile import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
