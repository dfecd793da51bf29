"""Runs transformers' own loader over tensors that record how they were made.

``from_pretrained(None, config=..., state_dict=...)`` is a public entry point. The state dict holds *traced* tensors: on the meta
device, with the stored shapes. After loading, the model's parameters are expressions over checkpoint tensors: renamed, stacked,
concatenated, split or transposed, as in this version of transformers. No weight is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PretrainedConfig, PreTrainedModel

from rq_compile.architectures.interface import put_behind_interface
from rq_compile.architectures.sources.expression import Expression, Source, Step


@dataclass(frozen=True)
class Traces:
    """A model on the meta device whose parameters are expressions.

    ``parameters``: every parameter and buffer that is made from checkpoint tensors, by its name in ``model``. ``missing``: the
    model's parameters and persistent buffers without tensors, including those that the loader would fill with new values.
    ``mismatched``: those whose tensors have another shape -> that shape, and the model's. ``unexpected``: the tensors that no
    parameter uses. Buffers that no checkpoint holds (rotary frequencies) are real.
    """

    model: PreTrainedModel
    parameters: dict[str, Expression]
    missing: frozenset[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unexpected: frozenset[str]


def trace(
    model_class: type[PreTrainedModel], config: PretrainedConfig, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> Traces:
    """The traces of the ``model_class`` of ``config`` over checkpoint tensors, given as name -> (shape, dtype)."""
    state = {
        name: Traced.of(torch.empty(shape, dtype=dtype, device="meta"), Source(tuple(shape), name))
        for name, (shape, dtype) in tensors.items()
    }
    loader: Any = model_class
    model, loaded = loader.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
    )
    parameters: dict[str, Expression] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if isinstance(tensor, Traced):
            parameters[name] = tensor.expression
            _replace(model, name, tensor.as_subclass(torch.Tensor))
    mismatched = {name: (tuple(there), tuple(asked)) for name, there, asked in loaded["mismatched_keys"]}
    missing = {*loaded["missing_keys"], *(name for name in model.state_dict() if name not in parameters)}
    put_behind_interface(model)
    return Traces(model.eval(), parameters, frozenset(missing), mismatched, frozenset(loaded["unexpected_keys"]))


def _replace(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, attribute, nn.Parameter(tensor, False) if attribute in module._parameters else tensor)


class Traced(torch.Tensor):
    """A tensor on the meta device together with its expression."""

    expression: Expression

    @staticmethod
    def of(meta: torch.Tensor, expression: Expression) -> "Traced":
        traced = meta.as_subclass(Traced)
        traced.expression = expression
        return traced

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        original, name, kwargs = args, getattr(function, "__name__", str(function)), dict(kwargs or {})
        if name == "to":  # leaving the meta device would need the weights
            kwargs.pop("device", None)
            args = tuple(value for value in args if not isinstance(value, torch.device | str))
        plain = tree_map(lambda leaf: leaf.as_subclass(torch.Tensor) if isinstance(leaf, Traced) else leaf, (args, kwargs))
        result = function(*plain[0], **plain[1])
        if name in ("requires_grad_", "__set__"):
            return args[0]
        args, kwargs = tree_map(lambda leaf: leaf.expression if isinstance(leaf, Traced) else leaf, (args, kwargs))
        if name == "__setitem__":  # some `_init_weights` write into a buffer that was loaded
            target = plain[0][0]
            original[0].expression = Step(tuple(target.shape), _with_item, args, {})
            return None
        if name.endswith("_") and not name.startswith("_"):
            raise NotImplementedError(f"{name} changes a weight in place while it is loaded")
        if isinstance(result, torch.Tensor):
            return Traced.of(result, Step(tuple(result.shape), function, args, kwargs))
        if isinstance(result, tuple | list) and result and all(isinstance(item, torch.Tensor) for item in result):
            return tuple(
                Traced.of(item, Step(tuple(item.shape), function, args, kwargs, number)) for number, item in enumerate(result)
            )
        return result


def _with_item(tensor: torch.Tensor, place: Any, value: Any) -> torch.Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed
