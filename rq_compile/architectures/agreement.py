"""Compares a checkpoint's config, its tensors and the parameters of the model that the config describes.

Sizes are compared first, before anything is built from them: config.json is small and may state anything, while the bytes of the
tensors exist. A loop over a billion layers or a table of a billion heads is refused. Then every weight of the empty model is
compared with every tensor. Each kind of difference has one answer:

| difference | answer |
|---|---|
| a weight without a tensor | refused, unless the config ties it to a weight with a tensor |
| a tensor of another shape, or not of a floating-point type | refused |
| a tensor that no weight needs, stored or only listed in the index | a remark |
| weights that the config ties, but whose tensors differ | a remark; both are used, as transformers does |
| experts stored in several formats | a remark |
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rq_compile.architectures.config_values import values_of
from rq_compile.architectures.families import Family
from rq_compile.architectures.layers import EXPERTS_KEYS, MoeLayer, layer_tensors
from rq_compile.checkpoint.checkpoint import FLOATS, Checkpoint
from rq_compile.checkpoint.safetensors_file import read_ends
from rq_compile.errors import UserError
from rq_compile.quantization.formats import SLOT_FORMATS, Format

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# The names of tensors' dimensions in a config. Those of the second row may be 0 or null in some families.
DIMENSIONS = (
    *("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
)
OPTIONAL_DIMENSIONS = (
    *("intermediate_size", "shared_expert_intermediate_size", "n_shared_experts", "head_dim", "q_lora_rank", "kv_lora_rank"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "d_kv", "d_ff", "n_group", "topk_group", "first_k_dense_replace"),
)
LAYERS = ("num_hidden_layers", "num_decoder_layers")
# Also for the parts that read images and sound.
LAYERS_OF_PARTS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth")
FLOATING = (*FLOATS, np.dtype(np.float64))
SHOWN = 3
SAMPLE = 4096
TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class Agreement:
    """The result of the comparison.

    ``tensors``: non-expert weight (parameter or persistent buffer) -> the checkpoint's tensor; tied weights share one.
    ``tied``: weight without its own tensor -> the weight that it is tied to. ``unused``: tensors that no weight needs.
    ``other_parts``: tensors of the model's parts for vision and sound, which an engine does not contain.
    ``experts``: the tensors of each MoE layer's experts, by index. ``formats``: the format of most experts of each MoE layer, by
    index; ``format``: that of most experts of all layers. ``remarks``: a sentence for each difference that is not an error.
    """

    tensors: dict[str, str]
    tied: dict[str, str]
    unused: tuple[str, ...]
    experts: dict[int, tuple[str, ...]]
    formats: dict[int, Format]
    format: Format
    remarks: tuple[str, ...]
    other_parts: tuple[str, ...] = ()


def check_sizes(checkpoint: Checkpoint, config: "PretrainedConfig") -> None:
    """Check the sizes of the language model, also if it is part of a multimodal model.

    Raises:
        UserError: a stated size is not an integer, or is larger than the tensors allow.
    """
    language = config.get_text_config()
    for part in (config,) if language is config else (config, language):
        _check_sizes(checkpoint, part)


def check_layers(checkpoint: Checkpoint, stated: dict[str, Any]) -> None:
    """Check the numbers of layers of all parts of a model, before a config is made from what is ``stated``. Some configs list
    their layers when they are made.

    Raises:
        UserError: there are more layers than tensors.
    """
    for key, value in stated.items():
        if isinstance(value, dict):
            check_layers(checkpoint, value)
        elif key in LAYERS_OF_PARTS and isinstance(value, int | float):
            _check_size(checkpoint, key, int(value) if value == value // 1 else value, 0, len(checkpoint.names))


def _check_sizes(checkpoint: Checkpoint, config: "PretrainedConfig") -> None:
    largest = max((max(weight.shape, default=1) for weight in checkpoint.weights()), default=1)
    limits = dict.fromkeys(DIMENSIONS, (1, largest)) | dict.fromkeys(OPTIONAL_DIMENSIONS, (0, largest))
    limits |= dict.fromkeys(LAYERS, (1, len(checkpoint.names)))
    for key, (least, most) in limits.items():
        for value in values_of(config, key):
            if value is not None or least > 0:
                _check_size(checkpoint, key, value, least, most)
    experts = next((value for key in EXPERTS_KEYS if type(value := getattr(config, key, None)) is int), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if experts is not None and type(chosen) is int and chosen > experts:
        raise UserError(f"{checkpoint.path / 'config.json'} chooses {chosen} of {experts} experts; correct it", 2)


def _check_size(checkpoint: Checkpoint, key: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        config = checkpoint.path / "config.json"
        raise UserError(
            f"{config} says {key} {repr(value)[:40]}, which its tensors do not allow ({least} to {most}); "
            "correct it, or use the config.json published with these weights",
            2,
        )


def check_names(checkpoint: Checkpoint, family: Family) -> None:
    """
    Raises:
        UserError: the names of all tensors are those of another module: a wrapper, or a model without its head.
    """
    embedding = family.tied_to
    if embedding in checkpoint:
        return
    wrapped = next((name for name in checkpoint.names if name.endswith(f".{embedding}")), None)
    if wrapped is not None:
        prefix = wrapped.removesuffix(embedding)
        raise UserError(
            f"the tensors of {checkpoint.path} are named {prefix}...; save the model that the wrapper holds, without the prefix",
            2,
        )
    inner = embedding.partition(".")[2]
    if inner.count(".") and inner in checkpoint:
        raise UserError(
            f"{checkpoint.path} is a model without its head: it has {inner}, not {embedding}; save the whole causal model",
            2,
        )


def compare(checkpoint: Checkpoint, family: Family, layers: tuple[MoeLayer, ...], empty: "PreTrainedModel") -> Agreement:
    """Compare every weight of ``empty``, the model without weights, with every tensor. Only the ends of tied tensors are read.

    Raises:
        UserError: a tensor is missing, or has another shape or type than the model needs.
    """
    for layer in layers:
        _check_experts(checkpoint, layer, empty)
    ties = dict(getattr(empty, "all_tied_weights_keys", {}))
    inside = tuple(f"{layer.name}." for layer in layers)
    weights = {name: value for name, value in empty.state_dict().items() if not name.startswith(inside)}
    own = {weight: _tensor_of(checkpoint, family, weight) for weight in weights}
    tensors: dict[str, str] = {}
    tied: dict[str, str] = {}
    for weight, value in weights.items():
        tensor = own[weight]
        if tensor is None:
            partner = _partner(weight, ties, own)
            if partner is None:
                raise missing(checkpoint, empty, weight, family.tensor_name(weight))
            tied[weight], tensor = partner, own[partner]
        assert tensor is not None
        _check(checkpoint, tensor, value)
        tensors[weight] = tensor
    experts = {layer.index: layer_tensors(checkpoint, family, layer) for layer in layers}
    for names in experts.values():
        for tensor in names:
            check_floating(checkpoint, tensor)
    used = {*tensors.values(), *(name for names in experts.values() for name in names)}
    stack = family.tensor_name(family.experts).partition("{layer}")[0]
    found = agreement_of(checkpoint, tensors, experts, used, stack, getattr(empty.config, "num_hidden_layers", 0))
    for layer in layers:
        _check_stray(checkpoint, family, layer, found.unused)
    return replace(found, tied=tied, remarks=(*found.remarks, *tie_remarks(checkpoint, ties, own)))


def agreement_of(
    checkpoint: Checkpoint,
    tensors: dict[str, str],
    experts: Mapping[int, Iterable[str]],
    used: Collection[str],
    stack: str = "model.layers.",
    layers: int = 0,
) -> Agreement:
    """The agreement if nothing is missing. ``experts``: the tensors of each MoE layer's experts, by index. ``used``: all tensors
    that the model uses. ``stack``: the common prefix of the names of its ``layers`` layers.

    Raises:
        UserError: experts are stored in a type that is not a floating-point number.
    """
    counts = {index: _formats(checkpoint, names) for index, names in experts.items()}
    unused = tuple(name for name in checkpoint.names if name not in used)
    most = _most(sum(counts.values(), Counter[Format]()))
    remarks = (*checkpoint.remarks, *_unused_remarks(checkpoint, stack, layers, unused), *_format_remarks(counts, most))
    formats = {index: _most(count) for index, count in counts.items()}
    return Agreement(tensors, {}, unused, {index: tuple(names) for index, names in experts.items()}, formats, most, remarks)


def _check_experts(checkpoint: Checkpoint, layer: MoeLayer, empty: "PreTrainedModel") -> None:
    """Check that the config describes the experts of the tensors."""
    geometry, config = layer.geometry, checkpoint.path / "config.json"
    try:
        module = empty.get_submodule(layer.name)
    except AttributeError:
        raise UserError(
            f"{layer.name} of {checkpoint.path} has experts, but its config.json says that the layer is dense; "
            "use the config.json published with these weights",
            2,
        ) from None
    asked = sum(parameter.numel() for parameter in module.parameters())
    there = geometry.experts * geometry.expert_weights
    if asked != there:
        raise UserError(
            f"{layer.name} of {checkpoint.path} has {geometry.experts} experts of {geometry.hidden} x {geometry.intermediate}, "
            f"{there} weights, but {config} needs {asked}; use the config.json published with these weights",
            2,
        )


def _check_stray(checkpoint: Checkpoint, family: Family, layer: MoeLayer, unused: tuple[str, ...]) -> None:
    module = f"{family.tensor_name(layer.name)}."
    for name in unused:
        number = re.search(r"\d+", name.removeprefix(module)) if name.startswith(module) else None
        if number and int(number[0]) >= layer.geometry.experts:
            raise UserError(
                f"{checkpoint.path} has {name}, but its config.json says {layer.geometry.experts} experts; correct it", 2
            )


def _tensor_of(checkpoint: Checkpoint, family: Family, weight: str) -> str | None:
    """The weight's own tensor, under its published name or its name in transformers."""
    return next((name for name in (family.tensor_name(weight), weight) if name in checkpoint), None)


def _partner(weight: str, ties: dict[str, str], own: dict[str, str | None]) -> str | None:
    """A weight with a tensor that the config ties ``weight`` to, in either direction."""
    source = ties.get(weight, weight)
    group = [source, *(target for target, other in ties.items() if other == source)]
    return next((other for other in group if weight in group and other != weight and own.get(other)), None)


def missing(checkpoint: Checkpoint, empty: "PreTrainedModel", weight: str, name: str) -> UserError:
    """The error if ``weight``, a parameter of ``empty``, has no tensor. ``name``: the name that the tensor would have."""
    lacks = f"{checkpoint.lacks(name)}, which its config.json needs"
    if name in checkpoint.absent:
        return UserError(f"{lacks}; copy that file there", 2)
    similar = next((other for other in checkpoint.names if other.endswith(f".{name}")), None)
    if similar is not None:
        return UserError(f"{lacks}, but it has {similar}; save the model without the wrapper that renamed its tensors", 2)
    if weight in (getattr(empty, "_tied_weights_keys", None) or {}) and not getattr(empty.config, TIE, False):
        return UserError(
            f"{lacks}, because it does not tie it to the embedding ({TIE} is false); "
            "set that to true if the model shares the two, or add the file that holds the tensor",
            2,
        )
    return UserError(f"{lacks}; add the file that holds it, or use the config.json published with these weights", 2)


def _check(checkpoint: Checkpoint, tensor: str, value: "torch.Tensor") -> None:
    if checkpoint.shape(tensor) != tuple(value.shape):
        raise UserError(
            f"{tensor} of {checkpoint.path} has shape {list(checkpoint.shape(tensor))}, but its config.json needs "
            f"{list(value.shape)}; use the config.json published with these weights",
            2,
        )
    if value.is_floating_point():
        check_floating(checkpoint, tensor)


def check_floating(checkpoint: Checkpoint, tensor: str) -> None:
    """
    Raises:
        UserError: a weight is not stored as floating-point numbers.
    """
    dtype = checkpoint.dtype_of(tensor)
    if dtype not in FLOATING:
        raise UserError(
            f"{tensor} of {checkpoint.path} is stored as {dtype}, but weights must be floating-point numbers; "
            "convert it to bf16, fp16 or fp32",
            2,
        )


def _formats(checkpoint: Checkpoint, names: Iterable[str]) -> Counter[Format]:
    """The number of weights in each format. For quantized weights, this is the format in which they are read."""
    count: Counter[Format] = Counter()
    for name in names:
        dtype = checkpoint.dtype_of(name)
        if dtype not in FLOATS:
            raise UserError(f"{name} of {checkpoint.path} is stored as {dtype}; convert it to bf16, fp16 or fp32", 2)
        count[FLOATS[dtype]] += checkpoint.size(name)
    return count


def _most(count: Counter[Format]) -> Format:
    return max(count, key=lambda format: (count[format], SLOT_FORMATS[format].bits))


def _unused_remarks(checkpoint: Checkpoint, stack: str, held: int, unused: tuple[str, ...]) -> list[str]:
    """Layers that the config does not count have their own remark: they may be an error of saving, or a prediction head."""
    absent = tuple(name for name in checkpoint.absent if name not in unused)
    inside = re.compile(re.escape(stack) + r"(\d+)\.")
    beyond = {int(match[1]) for name in unused if (match := inside.match(name)) and int(match[1]) >= held}
    of_layers = [name for name in unused if (match := inside.match(name)) and int(match[1]) in beyond]
    others = [name for name in unused if name not in set(of_layers)]
    remarks = []
    if beyond:
        layers = f"layer {min(beyond)}" if len(beyond) == 1 else f"layers {min(beyond)} to {max(beyond)}"
        remarks.append(
            f"{layers} of the checkpoint left out ({len(of_layers)} tensors): config.json says that the model has {held} layers"
        )
    if others:
        remarks.append(f"{listed(others)} left out: the model has no such weight")
    if absent:
        remarks.append(f"{listed(absent)} listed in the index but in no file: the model has no such weight")
    return remarks


def listed(names: "list[str] | tuple[str, ...]") -> str:
    """How many tensors there are, and the names of some."""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:SHOWN])}{more})"


def tie_remarks(checkpoint: Checkpoint, ties: dict[str, str], own: Mapping[str, str | None]) -> list[str]:
    """Remarks about tied weights whose own tensors differ. ``ties``: weight -> the weight that the config ties it to."""
    remarks = []
    for weight, source in ties.items():
        one, other = own.get(weight), own.get(source)
        if one is None or other is None or one == other:
            continue
        if _ends(checkpoint, one) != _ends(checkpoint, other):
            remarks.append(f"{one} and {other} differ, although config.json ties them ({TIE}); both are used as they are")
    return remarks


def _ends(checkpoint: Checkpoint, name: str) -> list[bytes]:
    return list(read_ends(checkpoint.weight(name).parts.values(), SAMPLE))


def _format_remarks(counts: dict[int, Counter[Format]], most: Format) -> list[str]:
    other = {index: sorted(count.keys() - {most}) for index, count in counts.items() if count.keys() - {most}}
    if not other:
        return []
    formats = ", ".join(sorted({format for found in other.values() for format in found}))
    layers = f"layer{'s' * (len(other) > 1)} {', '.join(map(str, other))}"
    return [f"experts of {layers} are stored in {formats}, most others in {most}: a plan counts and rounds them as {most}"]
