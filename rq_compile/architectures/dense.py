"""Everything of a model that is no expert weight, one tensor at a time, by its name in the transformers model."""

import numpy as np

from rq_compile.architectures.families import family_of
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError


def dense_tensor(checkpoint: Checkpoint, parameter: str) -> np.ndarray:
    """A parameter or persistent buffer in its stored dtype.

    Raises:
        UserError: see ``dense_name``.
    """
    return checkpoint.read(dense_name(checkpoint, parameter))


def dense_name(checkpoint: Checkpoint, parameter: str) -> str:
    """The checkpoint's tensor for a parameter or persistent buffer; renamed and tied ones are found under their other name.

    Raises:
        UserError: the checkpoint has no such tensor.
    """
    family = family_of(checkpoint)
    names = [family.tensor_name(parameter), parameter]
    if parameter in family.tied or parameter == family.tied_to:
        names += [family.tied_to, *family.tied]
    for name in names:
        if name in checkpoint:
            return name
    raise UserError(f"{checkpoint.path} has no tensor for the parameter {parameter}; download the checkpoint again", 2)
