"""The MoE layers of a checkpoint and the weights of one expert, in canonical layout (``ExpertGeometry``)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from rq_compile.architectures.families import Family
from rq_compile.architectures.geometry import Activation, ExpertGeometry
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError
from rq_compile.quantization.second_moment import SecondMoment
from rq_compile.quantization.source_numbers import SourceNumbers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GATED_BY: dict[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
PLAIN: dict[str, Activation] = {"relu": "relu", "gelu": "gelu"}
EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
Projection = Literal["up", "down"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


@dataclass(frozen=True)
class MoeLayer:
    """``name``: the experts module in the transformers model. ``index``: the layer's number; in an encoder-decoder model, decoder
    blocks are counted after those of the encoder."""

    name: str
    index: int
    geometry: ExpertGeometry


@dataclass(frozen=True)
class ExpertWeights:
    """``up [F, hidden]`` and ``down [hidden, intermediate]`` in the checkpoint's dtype; ``up_bias [F]`` and
    ``down_bias [hidden]`` in fp32, or None. The moments are those of the inputs of the two matrices, if the calibration has them.
    The numbers are those of the checkpoint, if it stores numbers of few bits with scales. ``mean_output [hidden]`` replaces the
    expert where it is constant, if the calibration has it."""

    up: np.ndarray
    down: np.ndarray
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None
    up_moment: SecondMoment | None = None
    down_moment: SecondMoment | None = None
    up_numbers: SourceNumbers | None = None
    down_numbers: SourceNumbers | None = None
    mean_output: np.ndarray | None = None


def moe_layers(checkpoint: Checkpoint, family: Family, config: "PretrainedConfig") -> list[MoeLayer]:
    """Every MoE layer by index, from the config and the tensors' names and shapes. No weights are read.

    Raises:
        UserError: there is no MoE layer, an activation is not supported, experts are missing or have unequal shapes, or their
            number differs from the config.
    """
    count = _expert_count(config)
    layers = [
        MoeLayer(name, number, _geometry(checkpoint, family, config, name))
        for number, name in enumerate(_experts_modules(family, config))
        if _stacked(checkpoint, family, name)
        or any(_expert_tensor(family, name, family.down, expert) in checkpoint for expert in range(count))
    ]
    if not layers:
        raise UserError(f"{checkpoint.path} is not an MoE: no layer of it has experts; give a sparse MoE checkpoint", 2)
    return layers


def expert_matrix(checkpoint: Checkpoint, family: Family, layer: MoeLayer, expert: int, projection: Projection) -> np.ndarray:
    """One of the two matrices of a logical expert, as ``ExpertWeights`` has them; reads nothing else.

    Raises:
        UserError: a tensor is missing (``moe_layers`` has compared the shapes), or a value is not finite.
    """
    parts = [
        checkpoint.read(name) if row is None else checkpoint.read_row(name, row)
        for name, row in expert_tensors(checkpoint, family, layer, expert, projection)
    ]
    return _canonical(parts, family, projection)


def expert_numbers(
    checkpoint: Checkpoint, family: Family, layer: MoeLayer, expert: int, projection: Projection
) -> SourceNumbers | None:
    """The numbers and scales whose product is ``expert_matrix``, or None if the checkpoint does not store such.

    Raises:
        UserError: see ``expert_matrix``.
    """
    parts = []
    for name, row in expert_tensors(checkpoint, family, layer, expert, projection):
        weight = checkpoint.weight(name)
        if weight.source_group is None or (found := checkpoint.source_numbers(name, row)) is None:
            return None
        parts.append(replace(found, numbers=weight.shaped(found.numbers, row), scales=weight.shaped(found.scales, row)))
    if len({part.group for part in parts}) != 1:
        return None
    numbers, scales = ([getattr(part, what) for part in parts] for what in ("numbers", "scales"))
    return SourceNumbers(_canonical(numbers, family, projection), _canonical(scales, family, projection), parts[0].group)


def expert_tensors(
    checkpoint: Checkpoint, family: Family, layer: MoeLayer, expert: int, projection: Projection
) -> list[tuple[str, int | None]]:
    """The tensors of one of an expert's matrices, with the row of each, or None for the whole tensor."""
    stacked = _stacked(checkpoint, family, layer.name)
    if stacked is not None:
        return [(stacked[PROJECTIONS.index(projection)], expert)]
    names = family.up if projection == "up" else (family.down,)
    return [(_expert_tensor(family, layer.name, name, expert), None) for name in names]


def _canonical(parts: list[np.ndarray], family: Family, projection: Projection) -> np.ndarray:
    """The matrix, or its numbers or scales, in the layout of ``ExpertWeights``. Only the order of rows changes."""
    if not family.transposed:
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
    (matrix,) = parts
    return np.ascontiguousarray(_deinterleaved(matrix.T) if projection == "up" else matrix.T)


def expert_bias(
    checkpoint: Checkpoint, family: Family, layer: MoeLayer, expert: int, projection: Projection
) -> np.ndarray | None:
    """The bias of one of the two matrices, in the layout of ``ExpertWeights``. Reads nothing else.

    Raises:
        UserError: see ``expert_matrix``.
    """
    stacked = _stacked(checkpoint, family, layer.name)
    if stacked is None or not family.transposed:
        return None
    bias = checkpoint.read_row(f"{stacked[PROJECTIONS.index(projection)]}_bias", expert)
    return (_deinterleaved(bias) if projection == "up" else bias).astype(np.float32)


def _deinterleaved(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[0::2], rows[1::2]])


def _experts_modules(family: Family, config: "PretrainedConfig") -> Iterator[str]:
    """The name of the experts module of each layer, as if no layer were dense.

    These are the layers of the config, not of the checkpoint: DeepSeek-V3 stores its multi-token-prediction head as a further
    layer.
    """
    yield from (family.experts.format(layer=layer) for layer in range(config.num_hidden_layers))
    if family.decoder_experts is not None:
        yield from (family.decoder_experts.format(layer=layer) for layer in range(config.num_decoder_layers))


def _expert_count(config: "PretrainedConfig") -> int:
    return next(getattr(config, key) for key in EXPERTS_KEYS if hasattr(config, key))


def _expert_tensor(family: Family, module: str, tensor: str, expert: int) -> str:
    return f"{family.tensor_name(module)}.{tensor.format(e=expert)}"


def _stacked(checkpoint: Checkpoint, family: Family, module: str) -> tuple[str, str] | None:
    """The tensors that hold all experts of a layer, or None if experts are stored one by one."""
    up, down = f"{module}.gate_up_proj", f"{module}.down_proj"
    for names in ((family.tensor_name(up), family.tensor_name(down)), (up, down)):
        if all(name in checkpoint for name in names):
            return names
    return None


def _geometry(checkpoint: Checkpoint, family: Family, config: "PretrainedConfig", module: str) -> ExpertGeometry:
    """The geometry from the shape of the first expert's ``down``, after checking that all experts have the resulting shapes."""
    stacked = _stacked(checkpoint, family, module)
    if stacked is None:
        _check_numbers(checkpoint, family, module, _expert_count(config))
    down = stacked[1] if stacked else _expert_tensor(family, module, family.down, 0)
    shape = checkpoint.shape(down)
    if len(shape) != (3 if stacked else 2) or 0 in shape:
        raise UserError(
            f"{down} of {checkpoint.path} has shape {list(shape)}, which experts cannot have; correct it",
            2,
        )
    hidden, intermediate = reversed(shape[-2:]) if family.transposed else shape[-2:]
    experts = _expert_count(config)
    top_k = family.top_k or config.num_experts_per_tok
    if not 1 <= top_k <= experts:
        raise UserError(f"{checkpoint.path / 'config.json'} chooses {top_k} of {experts} experts; correct it", 2)
    geometry = ExpertGeometry(
        experts=experts,
        top_k=top_k,
        hidden=hidden,
        intermediate=intermediate,
        activation="clamped_swiglu" if family.transposed else _activation(family, config, module),
    )
    if family.transposed:
        geometry = geometry.model_copy(update={"bias": True, "alpha": config.swiglu_alpha, "limit": config.swiglu_limit})
    for name, shape in _tensor_shapes(checkpoint, family, module, geometry).items():
        if name not in checkpoint:
            raise UserError(f"{checkpoint.lacks(name)}; add the file that holds it", 2)
        if checkpoint.shape(name) != shape:
            raise UserError(
                f"{name} of {checkpoint.path} has shape {list(checkpoint.shape(name))}, but {list(shape)} is expected of each of "
                f"{geometry.experts} equal experts; use the config.json published with these weights",
                2,
            )
    return geometry


def _check_numbers(checkpoint: Checkpoint, family: Family, module: str, experts: int) -> None:
    """Check that exactly the experts that the config counts are present."""
    names = [_expert_tensor(family, module, family.down, expert) for expert in range(experts + 1)]
    missing = [name for name in names[:-1] if name not in checkpoint]
    if missing:
        raise UserError(
            f"{module} has {experts - len(missing)} experts, but config.json says {experts}: {checkpoint.lacks(missing[0])}; "
            "add the file that holds it, or correct the config (all layers have the same number of experts)",
            2,
        )
    if names[-1] in checkpoint:
        raise UserError(f"{checkpoint.path} has {names[-1]}, but its config.json says {experts} experts; correct it", 2)


def layer_tensors(checkpoint: Checkpoint, family: Family, layer: MoeLayer) -> dict[str, tuple[int, ...]]:
    """The tensors of the experts of a layer, with their shapes."""
    return _tensor_shapes(checkpoint, family, layer.name, layer.geometry)


def _tensor_shapes(checkpoint: Checkpoint, family: Family, module: str, geometry: ExpertGeometry) -> dict[str, tuple[int, ...]]:
    stacked = _stacked(checkpoint, family, module)
    return _stacked_shapes(geometry, stacked) if stacked else _shapes(family, module, geometry)


def _shapes(family: Family, module: str, geometry: ExpertGeometry) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, of experts that are stored one by one."""
    up, down = (geometry.intermediate, geometry.hidden), (geometry.hidden, geometry.intermediate)
    shapes = [(name, up) for name in family.up] + [(family.down, down)]
    return {_expert_tensor(family, module, name, e): shape for e in range(geometry.experts) for name, shape in shapes}


def _stacked_shapes(geometry: ExpertGeometry, stacked: tuple[str, str]) -> dict[str, tuple[int, ...]]:
    up, down = (geometry.up_rows, geometry.hidden), (geometry.hidden, geometry.intermediate)
    if not geometry.bias:
        return {name: (geometry.experts, *shape) for name, shape in zip(stacked, (up, down), strict=True)}
    shapes = {name: (geometry.experts, *reversed(shape)) for name, shape in zip(stacked, (up, down), strict=True)}
    return shapes | {f"{name}_bias": (geometry.experts, shape[0]) for name, shape in zip(stacked, (up, down), strict=True)}


def _activation(family: Family, config: "PretrainedConfig", module: str) -> Activation:
    known = GATED_BY if len(family.up) > 1 else PLAIN
    value = getattr(config, family.activation)
    if value not in known:
        raise UserError(
            f"{module} uses the activation {family.activation}={value}, which is not supported; "
            f"use a model with {', '.join(known)}"
        )
    return known[value]
