"""Parameters as expressions over checkpoint tensors.

``Source`` is a checkpoint tensor, ``Step`` an operation of transformers' loader on other expressions. ``select`` returns one
slice of the first dimension. It pushes the slice down through the operations to the tensors that it needs. One expert of a
stacked parameter is therefore read from its own tensors, or from its own row of a tensor that holds all experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

# Reads a checkpoint tensor, or slice ``row`` of its first dimension.
Read = Callable[[str, int | None], torch.Tensor]
Rule = Callable[["Step", int], "Expression | None"]

# Operations that change the dtype, the device or the memory layout, but no values.
CASTS = frozenset({"to", "contiguous", "detach", "clone", "requires_grad_", "float", "bfloat16", "half", "type", "cpu"})


@dataclass(frozen=True, eq=False)
class Expression:
    """A tensor of ``shape`` that has not been computed."""

    shape: tuple[int, ...]

    def sources(self) -> list["Source"]:
        """The checkpoint tensors from which it is computed, each once, in the order of reading."""
        raise NotImplementedError

    def operations(self) -> set[str]:
        """The names of the operations on them."""
        raise NotImplementedError

    def compute(self, read: Read) -> torch.Tensor:
        """The value, in the stored dtype: casts between floating-point types are left out."""
        raise NotImplementedError

    def select(self, index: int) -> "Expression":
        """Slice ``index`` of the first dimension, as an expression over as few tensors as possible."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Source(Expression):
    """The checkpoint tensor ``name``, or slice ``row`` of its first dimension."""

    name: str
    row: int | None = None

    def sources(self) -> list["Source"]:
        return [self]

    def operations(self) -> set[str]:
        return set()

    def compute(self, read: Read) -> torch.Tensor:
        return read(self.name, self.row)

    def select(self, index: int) -> Expression:
        if self.row is None:
            return Source(self.shape[1:], self.name, index)
        return step(torch.select, self, 0, index)


@dataclass(frozen=True, eq=False)
class Step(Expression):
    """Output ``output`` of ``function(*args, **kwargs)``, or its only output. The arguments may contain expressions."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: int | None = None

    @property
    def operation(self) -> str:
        return getattr(self.function, "__name__", str(self.function)).strip("_")

    @property
    def is_cast(self) -> bool:
        return self.operation in CASTS and bool(self.args) and isinstance(self.args[0], Expression)

    def sources(self) -> list[Source]:
        return self._sources

    @cached_property
    def _sources(self) -> list[Source]:
        found = [source for part in self._parts for source in part.sources()]
        return list({(source.name, source.row): source for source in found}.values())

    @cached_property
    def _parts(self) -> list[Expression]:
        """The expressions among its arguments."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Expression)]

    def operations(self) -> set[str]:
        return {self.operation}.union(*(part.operations() for part in self._parts))

    def compute(self, read: Read) -> torch.Tensor:
        if self.is_cast:
            return self.args[0].compute(read)
        args, kwargs = tree_map(
            lambda leaf: leaf.compute(read) if isinstance(leaf, Expression) else leaf, (self.args, self.kwargs)
        )
        value = self.function(*args, **{key: value for key, value in kwargs.items() if key != "device"})
        return value if self.output is None else value[self.output]

    def select(self, index: int) -> Expression:
        rule = CAST_RULE if self.is_cast else RULES.get(self.operation)
        return (rule and rule(self, index)) or step(torch.select, self, 0, index)

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """A positional argument that may have been passed by one of ``names``."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)


def whole_tensor(expression: Expression) -> str | None:
    """The tensor, if the expression is a whole tensor (``tensor[...]``), except for casts; otherwise None."""
    while isinstance(expression, Step) and (expression.is_cast or expression.args[1:] == (...,)):
        expression = expression.args[0]
    return expression.name if isinstance(expression, Source) and expression.row is None else None


def step(function: Callable[..., Any], *args: Any, output: int | None = None) -> Step:
    """``function(*args)`` as an expression. Its shape is computed on the meta device."""
    shapes = tree_map(lambda leaf: torch.empty(leaf.shape, device="meta") if isinstance(leaf, Expression) else leaf, args)
    result = function(*shapes)
    return Step(tuple((result if output is None else result[output]).shape), function, args, output=output)


def _cast(node: Step, index: int) -> Expression:
    return node.args[0].select(index)


def _stack(node: Step, index: int) -> Expression:
    parts, dim = list(node.args[0]), node.argument(1, "dim", "axis", default=0) % len(node.shape)
    return parts[index] if dim == 0 else step(torch.stack, [part.select(index) for part in parts], dim - 1)


def _cat(node: Step, index: int) -> Expression:
    parts, dim = list(node.args[0]), node.argument(1, "dim", "axis", default=0) % len(node.shape)
    if dim > 0:
        return step(torch.cat, [part.select(index) for part in parts], dim - 1)
    for part in parts:
        if index < part.shape[0]:
            return part.select(index)
        index -= part.shape[0]
    raise IndexError(index)


def _split(node: Step, index: int) -> Expression | None:
    whole, sizes = node.args[0], node.argument(1, "chunks", "split_size_or_sections", "split_size")
    function = torch.chunk if node.operation == "chunk" else torch.split
    dim = node.argument(2, "dim", default=0) % len(whole.shape)
    if dim > 0:
        return step(function, whole.select(index), sizes, dim - 1, output=node.output)
    parts = function(torch.empty(whole.shape, device="meta"), sizes, 0)
    return whole.select(sum(part.shape[0] for part in parts[: node.output]) + index)


def _unbind(node: Step, index: int) -> Expression | None:
    assert node.output is not None
    return node.args[0].select(node.output).select(index) if node.argument(1, "dim", default=0) == 0 else None


def _getitem(node: Step, index: int) -> Expression | None:
    return node.args[0].select(index) if node.args[1] is Ellipsis else None


def _transpose(node: Step, index: int) -> Expression | None:
    first, second = (node.argument(position, f"dim{position - 1}") % len(node.shape) for position in (1, 2))
    return step(torch.transpose, node.args[0].select(index), first - 1, second - 1) if min(first, second) > 0 else None


def _permute(node: Step, index: int) -> Expression | None:
    order = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    order = [dim % len(node.shape) for dim in order]
    return step(torch.permute, node.args[0].select(index), [dim - 1 for dim in order[1:]]) if order[0] == 0 else None


def _reshape(node: Step, index: int) -> Expression | None:
    whole = node.args[0]
    return step(torch.reshape, whole.select(index), node.shape[1:]) if whole.shape[:1] == node.shape[:1] else None


def _elementwise(node: Step, index: int) -> Expression | None:
    sides = [_broadcast(side, node.shape, index) for side in node.args]
    return None if any(side is None for side in sides) else step(node.function, *sides)


def _broadcast(side: Any, shape: tuple[int, ...], index: int) -> Any:
    if not isinstance(side, Expression) or len(side.shape) < len(shape):
        return side
    return side.select(index) if side.shape[0] == shape[0] else side.select(0) if side.shape[0] == 1 else None


CAST_RULE: Rule = _cast
RULES: dict[str, Rule] = {
    "stack": _stack,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("chunk", "split"), _split),
    "unbind": _unbind,
    "getitem": _getitem,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
    **dict.fromkeys(("reshape", "view"), _reshape),
    **dict.fromkeys(("mul", "rmul", "div", "true_divide", "add", "sub"), _elementwise),
}
