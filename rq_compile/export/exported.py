"""What an export gives. It is apart from the exporter, so that a process that only gets the graph need not import that."""

from dataclasses import dataclass

import numpy as np
import onnx

from rq_compile.architectures.model import Model
from rq_compile.engine.manifest import CacheTensor


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer of the transformers model, by name, in the form of an initializer: unchanged or transposed."""

    name: str
    transposed: bool = False

    def read(self, model: Model) -> np.ndarray:
        """The values in the checkpoint's dtype.

        Raises:
            UserError: the checkpoint has no such tensor.
        """
        tensor = model.read(self.name)
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True)
class Exported:
    """``parameters``: the initializers of ``model`` that have no data, by name."""

    model: onnx.ModelProto
    parameters: dict[str, Parameter]
    opset: int
    encoder_decoder: bool
    cache: list[CacheTensor]
