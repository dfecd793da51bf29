"""A checkpoint's weights as transformers' own loader would place them, without a table of families and without reading
weights."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from torch.fx.experimental import _config as fx_config
from transformers import GenerationMixin
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from rq_compile.architectures.agreement import Agreement, agreement_of, check_floating, listed, missing, tie_remarks
from rq_compile.architectures.caches import empty_cache
from rq_compile.architectures.layers import MoeLayer, Projection
from rq_compile.architectures.misfit import misfit_of_experts, misfit_of_shapes, tensor_name
from rq_compile.architectures.probe import experts_geometry
from rq_compile.architectures.quiet import quiet_transformers
from rq_compile.architectures.sources.experts import ExpertSources, expert_sources, experts_modules
from rq_compile.architectures.sources.expression import CASTS, Expression, whole_tensor
from rq_compile.architectures.sources.tracing import Traces, trace
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError, reason
from rq_compile.quantization.source_numbers import SourceNumbers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Operations of a loader that only join, split or reorder matrices and their rows.
REARRANGING = frozenset(
    {*CASTS, "stack", "cat", "concat", "concatenate", "chunk", "split", "unbind", "getitem", "select", "gate_first"}
    | {"transpose", "swapaxes", "swapdims", "permute"}
)
TORCH_DTYPES = {np.dtype(ml_dtypes.bfloat16): torch.bfloat16}
WATCHED = "rq_compile_watched_experts"


@dataclass(frozen=True, eq=False)
class TracedWeights:
    """Every parameter and expert of a checkpoint as an expression over its tensors."""

    checkpoint: Checkpoint
    traces: Traces
    layers: tuple[MoeLayer, ...]
    _experts: dict[tuple[str, int], ExpertSources] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: "PretrainedConfig") -> "TracedWeights":
        """
        Raises:
            UserError: the config does not describe a language model of transformers that can be built, a parameter has no tensor,
                or no layer has supported experts.
        """
        model_class = model_class_of(config, checkpoint)
        tensors = {name: (checkpoint.shape(name), _torch_dtype(checkpoint.dtype_of(name))) for name in checkpoint.names}
        try:
            with quiet_transformers():
                traces = trace(model_class, config, tensors)
        except Exception as error:  # a config may be wrong in any way, and a loader may need something unexpected
            raise misfit_of_experts(checkpoint, config.get_text_config()) or UserError(
                f"transformers cannot load {checkpoint.path} as a {model_class.__name__}: {_reason(error)}; "
                "check its config.json against its tensors",
                2,
            ) from error
        _check_placed(traces, checkpoint, config)
        return cls(checkpoint, traces, tuple(_moe_layers(traces, checkpoint)))

    @property
    def model(self) -> "PreTrainedModel":
        """The model on the meta device."""
        return self.traces.model

    def agreement(self) -> Agreement:
        """The differences between config, tensors and parameters that are not errors.

        Raises:
            UserError: experts are stored in a type that is not a floating-point number.
        """
        inside = tuple(f"{layer.name}." for layer in self.layers)
        names = [name for name in self.traces.model.state_dict() if not name.startswith(inside)]
        tensors = {name: self.tensor(name) or f"parameter {name}" for name in names if name in self.traces.parameters}
        experts = {
            layer.index: {source.name for name in self._parameters_of(layer) for source in self.parameter(name).sources()}
            for layer in self.layers
        }
        used = {source.name for expression in self.traces.parameters.values() for source in expression.sources()}
        stack = re.match(r".*?\.(?=\d+\.)", min(min(experts.values())))
        layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", 0)
        found = agreement_of(self.checkpoint, tensors, experts, used, stack[0] if stack else "model.layers.", layers)
        ties = dict(getattr(self.model, "all_tied_weights_keys", {}))
        own = {name: whole_tensor(self.parameter(name)) for name in (*ties, *ties.values()) if name in tensors}
        tied = {weight: source for weight, source in ties.items() if own.get(weight) and own[weight] == own.get(source)}
        parts = self._beside_text()
        told = [f"{listed(parts)} left out: an engine reads text only"] if parts else []
        remarks = (*found.remarks, *told, *tie_remarks(self.checkpoint, ties, own))
        return replace(found, tied=tied, other_parts=parts, remarks=remarks)

    def _beside_text(self) -> tuple[str, ...]:
        """The tensors of a multimodal model that its language model does not need: those for vision and sound."""
        if self.model.config.get_text_config() is self.model.config:
            return ()
        text = (text_body(self.model), self.model.get_output_embeddings())
        inside = tuple(f"{name}." for name, module in self.model.named_modules() if any(module is part for part in text))
        tensors: dict[bool, set[str]] = {True: set(), False: set()}
        for name, expression in self.traces.parameters.items():
            tensors[name.startswith(inside)].update(source.name for source in expression.sources())
        return tuple(sorted(tensors[False] - tensors[True]))

    def _parameters_of(self, layer: MoeLayer) -> list[str]:
        return [name for name in self.traces.parameters if name.startswith(f"{layer.name}.")]

    def parameter(self, name: str) -> Expression:
        """
        Raises:
            UserError: the checkpoint has no tensor for this parameter.
        """
        try:
            return self.traces.parameters[name]
        except KeyError:
            raise UserError(f"{self.checkpoint.path} has no tensor for the parameter {name}; check its config.json", 2) from None

    def tensor(self, name: str) -> str | None:
        """The tensor of a parameter that is one tensor as stored; None if the parameter is computed."""
        return whole_tensor(self.parameter(name))

    def read(self, expression: Expression) -> np.ndarray:
        """The value in its stored dtype (bf16 as ``ml_dtypes.bfloat16``).

        Raises:
            UserError: a value is infinite or NaN.
        """
        return _numpy(expression.compute(self._read))

    def dtype_of(self, expression: Expression) -> np.dtype:
        """The dtype that ``read`` returns."""
        dtypes = {self.checkpoint.dtype_of(source.name) for source in expression.sources()}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def source_bytes(self, expression: Expression) -> int:
        """Bytes of the tensors, or their slices, from which it is computed, and of the decoded values."""
        sizes = 0
        for source in expression.sources():
            size = self.checkpoint.source_bytes(source.name)
            sizes += size if source.row is None else size // max(1, self.checkpoint.shape(source.name)[0])
        return sizes

    def matrix(self, layer: MoeLayer, expert: int, projection: Projection) -> np.ndarray:
        """As ``ExpertWeights`` has it."""
        found = self._expert(layer, expert)
        return np.ascontiguousarray(self.read(found.up if projection == "up" else found.down))

    def source_numbers(self, layer: MoeLayer, expert: int, projection: Projection) -> SourceNumbers | None:
        """The numbers and scales whose product is ``matrix``; None if there are none, as far as is known."""
        found = self._expert(layer, expert)
        expression = found.up if projection == "up" else found.down
        if not expression.operations() <= REARRANGING:
            return None
        parts: dict[tuple[str, int | None], SourceNumbers] = {}
        for source in expression.sources():
            weight = self.checkpoint.weight(source.name)
            if weight.source_group is None or (stored := self.checkpoint.source_numbers(source.name, source.row)) is None:
                return None
            parts[source.name, source.row] = stored
        groups = {part.group for part in parts.values()}
        if len(groups) != 1:
            return None
        group = groups.pop()

        def read(what: str) -> np.ndarray:
            def one(name: str, row: int | None) -> torch.Tensor:
                values = self.checkpoint.weight(name).shaped(getattr(parts[name, row], what), row)
                return _tensor(np.ascontiguousarray(values))

            return np.ascontiguousarray(_numpy(expression.compute(one)))

        numbers, scales = read("numbers"), read("scales")
        rows, columns = expression.shape
        fits = numbers.shape == (rows, columns) and scales.shape == (rows, -(-columns // group))
        return SourceNumbers(numbers, scales, group) if fits else None

    def bias(self, layer: MoeLayer, expert: int, projection: Projection) -> np.ndarray | None:
        """As ``ExpertWeights`` has it."""
        found = self._expert(layer, expert)
        bias = found.up_bias if projection == "up" else found.down_bias
        return None if bias is None else self.read(bias).astype(np.float32)

    def _expert(self, layer: MoeLayer, expert: int) -> ExpertSources:
        key = (layer.name, expert)
        if key not in self._experts:
            self._experts[key] = expert_sources(self.traces, layer.name, expert)
        return self._experts[key]

    def _read(self, name: str, row: int | None) -> torch.Tensor:
        return _tensor(self.checkpoint.read(name) if row is None else self.checkpoint.read_row(name, row))


def model_class_of(config: "PretrainedConfig", checkpoint: Checkpoint) -> "type[PreTrainedModel]":
    """transformers' class of a language model (for a multimodal model, the class with all parts).

    Raises:
        UserError: there is none, or it does not generate from left to right.
    """
    mappings: Any = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    for mapping in mappings:
        if type(config) in mapping:
            found = mapping[type(config)]
            found = found[0] if isinstance(found, tuple) else found
            if not issubclass(found, GenerationMixin):
                raise UserError(
                    f"{checkpoint.path} is a {found.__name__}, which does not write a text token by token; "
                    "give a checkpoint of a decoder-only MoE language model",
                    2,
                )
            return found
    raise UserError(
        f"{checkpoint.path} has the model_type {checkpoint.model_type}, which is not a language model of transformers; "
        "give a checkpoint of a decoder-only MoE language model",
        2,
    )


def set_experts_implementation(model: Any, implementation: str) -> None:
    """Set the implementation of all experts modules. ``PreTrainedModel.set_experts_implementation`` misses those in parts with
    their own config."""
    for _, module in experts_modules(model):
        module.config._experts_implementation = implementation


def text_body(model: Any) -> Any:
    """The part of a model that reads token ids, without the head. For a multimodal model, this is only its language model."""
    if model.config.is_encoder_decoder:
        return model.base_model
    decoder = model.get_decoder()
    # Llama 4's decoder is its language model, which includes the head.
    return decoder if decoder.get_output_embeddings() is None else decoder.model


def _check_placed(traces: Traces, checkpoint: Checkpoint, config: "PretrainedConfig") -> None:
    """Check that every parameter consists of tensors with its shape and floating-point numbers.

    Raises:
        UserError: a parameter does not.
    """
    if traces.mismatched:
        raise misfit_of_experts(checkpoint, config.get_text_config()) or misfit_of_shapes(checkpoint, traces)
    if traces.missing:
        ties = getattr(traces.model, "all_tied_weights_keys", {})
        # If a weight and the weight that it is tied to are both missing, the checkpoint lacks the second.
        weight = min((name for name in traces.missing if ties.get(name) not in traces.missing), default=min(traces.missing))
        raise missing(checkpoint, traces.model, weight, tensor_name(traces, weight))
    weights = traces.model.state_dict()
    for name, expression in traces.parameters.items():
        if name in weights and weights[name].is_floating_point():
            for source in expression.sources():
                check_floating(checkpoint, source.name)


def _reason(error: Exception) -> str:
    told = reason(error)[:300]
    return f"it does not know {told}" if isinstance(error, KeyError) else told


def _moe_layers(traces: Traces, checkpoint: Checkpoint) -> Iterator[MoeLayer]:
    _check_experts(traces, checkpoint, list(experts_modules(traces.model)))
    try:
        chosen = _top_k(traces.model)
    except Exception as error:  # as above: for example, inconsistent numbers of a router
        raise UserError(
            f"transformers cannot run a {type(traces.model).__name__} as {checkpoint.path / 'config.json'} describes it: "
            f"{_reason(error)}; correct it",
            2,
        ) from error
    found = [(name, module) for name, module in experts_modules(traces.model) if name in chosen]
    _check_experts(traces, checkpoint, found)
    for name, module in found:
        up, down = (traces.parameters.get(f"{name}.{part}") for part in (_up(module), "down_proj"))
        if up is None or down is None:
            raise UserError(f"{checkpoint.path} has no tensors for {name}; check that all of its files are there", 2)
        if not 1 <= chosen[name] <= down.shape[0]:
            config = checkpoint.path / "config.json"
            raise UserError(f"{config} chooses {chosen[name]} of {down.shape[0]} experts; correct it", 2)
        first = expert_sources(traces, name, 0)
        hidden, intermediate = first.down.shape
        number = re.search(r"\.(\d+)\.", name)
        geometry = experts_geometry(
            module, name, experts=down.shape[0], top_k=chosen[name], hidden=hidden, intermediate=intermediate
        )
        yield MoeLayer(name, int(number[1]) if number else len(found), geometry)


def _check_experts(traces: Traces, checkpoint: Checkpoint, found: list[tuple[str, Any]]) -> None:
    """
    Raises:
        UserError: there are no modules of experts among those ``found``.
    """
    if not found:
        raise UserError(
            f"{checkpoint.path} is not a supported MoE: no layer of a {type(traces.model).__name__} has experts that "
            "transformers' experts interface runs; give a sparse MoE checkpoint",
            2,
        )


def _up(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _top_k(model: Any) -> dict[str, int]:
    """Choices per token of every experts module that text reaches, as passed by its router in a run on the meta device."""
    found: dict[str, int] = {}
    ALL_EXPERTS_FUNCTIONS.register(WATCHED, lambda module, hidden_states, *_: torch.empty_like(hidden_states))

    def watch(name: str) -> Callable[..., None]:
        def seen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name] = (args[1] if len(args) > 1 else kwargs["top_k_index"]).shape[-1]

        return seen

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in experts_modules(model)]
    set_experts_implementation(model, WATCHED)
    try:
        # Without data, a boolean index selects everything.
        all_chosen = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
        with quiet_transformers(), torch.no_grad(), all_chosen:
            ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
            model(input_ids=ids, past_key_values=empty_cache(model), use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return TORCH_DTYPES.get(dtype) or torch.from_numpy(np.empty(0, dtype)).dtype


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.int8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.int8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
