"""Bytes of the non-expert weights that no plan changes."""

import math
from collections.abc import Sequence

from torch import nn

from rq_compile.architectures.dense_modules import LEAST_ROWS, DenseModule
from rq_compile.architectures.model import Model
from rq_compile.calibration.schema import OtherWeights
from rq_compile.quantization.dense_layout import paged


def other_weights(model: Model, dense: Sequence[DenseModule]) -> OtherWeights | None:
    """Those outside of all ``dense`` modules: norms, routers, biases, and matrices with few rows."""
    if not dense:
        return None
    planned = {name for module in dense for name in module.matrices}
    linear = {f"{name}.weight" for name, part in model.without_weights.named_modules() if isinstance(part, nn.Linear)}
    tables = {f"{name}.weight" for name, part in model.without_weights.named_modules() if isinstance(part, nn.Embedding)}
    sizes: dict[str, tuple[int, int]] = {}
    for name in model.names:
        if name in planned:
            continue
        shape, stored = model.shape(name), model.dtype_of(name).itemsize
        narrow = stored == 2 and (name in tables or (name in linear and shape[0] >= LEAST_ROWS))
        count = math.prod(shape)
        sizes[model.tensor(name)] = paged(count * (2 if narrow else 4)), paged(count * 4)
    return OtherWeights(stored=sum(size for size, _ in sizes.values()), fp32=sum(size for _, size in sizes.values()))
