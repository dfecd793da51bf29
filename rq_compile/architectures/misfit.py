"""Explains why the tensors of a checkpoint do not fit the model of its config, if transformers' loader could not place some.

The loader names parameters and shapes of whole stacks of experts. A user needs the name of the missing tensor, or the wrong
number.
"""

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from rq_compile.architectures.layers import EXPERTS_KEYS
from rq_compile.architectures.sources.expression import whole_tensor
from rq_compile.architectures.sources.tracing import Traces
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The name of an expert's tensor: the part before its number, the number, and the part after it.
OF_EXPERT = re.compile(r"(.*experts\.(?:expert_)?)(\d+)(\..+)")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
PUBLISHED = "use the config.json published with these weights"


def misfit_of_experts(checkpoint: Checkpoint, config: "PretrainedConfig") -> UserError | None:
    """The error in experts that are stored one by one: an expert is missing, lacks a matrix, or is superfluous. None if
    correct."""
    asked = next((getattr(config, key) for key in EXPERTS_KEYS if isinstance(getattr(config, key, None), int)), None)
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for match in filter(None, map(OF_EXPERT.fullmatch, checkpoint.names)):
        found[match[1]][int(match[2])].add(match[3])
    for module, experts in found.items():
        count = asked or max(experts) + 1
        matrices = sorted(set.union(*experts.values()))
        present = sum(number < count for number in experts)
        for number in range(count):
            lacking = next((matrix for matrix in matrices if matrix not in experts.get(number, ())), None)
            if lacking is not None:
                counted = f"{module.rstrip('.')} has {present} experts, but config.json says {count}: " if present < count else ""
                return UserError(
                    f"{counted}{checkpoint.lacks(f'{module}{number}{lacking}')}; add the file that holds it, or {PUBLISHED}", 2
                )
        if max(experts) >= count:
            name = f"{module}{max(experts)}{min(experts[max(experts)])}"
            return UserError(f"{checkpoint.path} has {name}, but its config.json says {count} experts; correct it", 2)
    return None


def misfit_of_shapes(checkpoint: Checkpoint, traces: Traces) -> UserError:
    """The error for the first parameter whose tensors have another shape than the config needs."""
    name, (there, asked) = min(traces.mismatched.items())
    tensor = tensor_name(traces, name)
    return UserError(
        f"{tensor} of {checkpoint.path} has shape {list(there)}, but its config.json needs {list(asked)}; {PUBLISHED}", 2
    )


def tensor_name(traces: Traces, parameter: str) -> str:
    """The name that the tensor of a parameter would have in this checkpoint: like the same tensor of another layer, or like most
    other tensors of the modules around it."""
    renamed = {name: tensor for name, part in traces.parameters.items() if (tensor := whole_tensor(part))}
    if parameter in renamed:
        return renamed[parameter]
    numbers = NUMBER.findall(parameter)
    for name, tensor in renamed.items():
        if NUMBER.sub("#", name) == NUMBER.sub("#", parameter) and len(NUMBER.findall(tensor)) == len(numbers):
            return NUMBER.sub("{}", tensor).format(*numbers)
    prefixes: dict[str, str] = {}
    for name, tensor in renamed.items():
        while "." in name and "." in tensor and name.rpartition(".")[2] == tensor.rpartition(".")[2]:
            name, tensor = name.rpartition(".")[0], tensor.rpartition(".")[0]
            prefixes.setdefault(name, tensor)
    inside = max((prefix for prefix in prefixes if parameter.startswith(f"{prefix}.")), key=len, default="")
    return prefixes[inside] + parameter.removeprefix(inside) if inside else parameter
