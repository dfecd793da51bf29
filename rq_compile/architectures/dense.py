"""Which tensor of a checkpoint a non-expert weight of the transformers model is."""

from rq_compile.architectures.families import Family
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError


def tensor_of(checkpoint: Checkpoint, family: Family, parameter: str) -> str:
    """The checkpoint's tensor for a parameter or persistent buffer; renamed and tied ones are found under their other name.

    Raises:
        UserError: the checkpoint has no such tensor.
    """
    names = [family.tensor_name(parameter), parameter]
    if parameter in family.tied or parameter == family.tied_to:
        names += [family.tied_to, *family.tied]
    for name in names:
        if name in checkpoint:
            return name
    raise UserError(f"{checkpoint.path} has no tensor for the parameter {parameter}; download the checkpoint again", 2)
