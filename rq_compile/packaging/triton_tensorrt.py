"""Triton's TensorRT backend: the config for plans of one model, each built for a compute capability."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rq_compile.errors import UserError
from rq_compile.packaging.triton_config import Tensor, messages, model_config


def config(
    name: str,
    plans: Mapping[str, str],
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    max_batch_size: int = 0,
    profiles: Sequence[Sequence[int]] = ((0,),),
) -> Any:
    """A ``ModelConfig``; ``plans``: compute capability (``"8.9"``) -> file in the version's folder.

    ``profiles`` are the optimization profiles of each instance group. An instance chooses among its own by the shapes of a
    request; a group apiece lets prompts and single tokens run side by side.

    Raises:
        UserError: a compute capability is not MAJOR.MINOR, or there is none.
    """
    if not plans:
        raise UserError("a TensorRT model for Triton needs a plan; give one for each GPU that is to run it", 2)
    for capability in plans:
        major, _, minor = capability.partition(".")
        if not (major.isdecimal() and minor.isdecimal()):
            raise UserError(f"{capability} is no compute capability; write it with a dot, such as 8.9", 2)
    config = model_config(name, "tensorrt", inputs, outputs, {})
    # No default beside these: a GPU without a plan must be refused by name, not given a plan that it cannot run.
    config.cc_model_filenames.update(plans)
    config.max_batch_size = max_batch_size
    if max_batch_size > 1:
        config.dynamic_batching.SetInParent()
    for group in profiles:
        config.instance_group.add(kind=messages().ModelInstanceGroup.KIND_GPU, count=1, profile=map(str, group))
    return config
