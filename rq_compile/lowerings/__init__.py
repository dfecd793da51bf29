"""Lowerings: how the MoE layers are written for a runtime. Each is one class in one file, which has everything that other stages
need to know about it.

Importing them does not import ONNX, numpy or pydantic, so that the command line can read this table for its help.
"""

from typing import Any

from rq_compile.lowerings.batched import Batched
from rq_compile.lowerings.cuda import Cuda
from rq_compile.lowerings.lowering import Lowering
from rq_compile.lowerings.native import Native
from rq_compile.lowerings.plugins import Plugins
from rq_compile.lowerings.ranks import Ranks
from rq_compile.lowerings.stock import Stock
from rq_compile.lowerings.tensorrt_lanes import TensorRTLanes

# Lowerings of ONNX Runtime engines, by name.
LOWERINGS: dict[str, type[Lowering]] = {kind.name: kind for kind in (Native, Stock, Batched, Ranks, Cuda)}
# Lowerings of TensorRT engines, by name.
TENSORRT_LOWERINGS: dict[str, type[Lowering]] = {kind.name: kind for kind in (TensorRTLanes, Plugins)}


def lowering_of(given: Lowering | str) -> Lowering:
    """``given``, or the lowering of that name with its default options.

    Raises:
        KeyError: there is no lowering of that name.
    """
    return LOWERINGS[given]() if isinstance(given, str) else given


def with_options(kind: type[Lowering], **options: Any) -> Lowering:
    """A lowering of ``kind`` with those of ``options`` that it has."""
    return kind(**{name: options[name] for name in kind.options})


def lowering_for(target: str, ranks: int = 1) -> type[Lowering]:
    """The default lowering of a plan for ``target`` whose engine has as many processes as the plan has ``ranks``."""
    if ranks > 1 and target in Ranks.default_for:
        return Ranks
    return next((kind for kind in LOWERINGS.values() if target in kind.default_for and not kind.of_ranks), Native)
