"""Describes a checkpoint folder and whether it can be compiled."""

from typing import Literal

from pydantic import Field

from rq_compile.architectures.geometry import Activation
from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.architectures.without_engine import why_no_engine
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.checkpoint.storage.weight import Plain
from rq_compile.errors import UserError
from rq_compile.files import Document
from rq_compile.targets.vocabulary import vocabulary


class LayerFound(Document):
    """One MoE layer. ``stored``: how its experts are stored. ``bytes``: bytes of all its experts as stored."""

    index: int
    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: Activation
    stored: str
    bytes: int


class CheckpointFound(Document):
    """``dtypes``: bytes of the tensors by their type in the files. ``formats``: bytes of the weights by storage format.

    ``tied``: a weight without its own tensor -> the weight that it is tied to. ``unused``: tensors that an engine does not need,
    or that only the index lists. ``why_not``: a sentence, if the checkpoint cannot be compiled. If it cannot be opened
    either, there are no layers, and the properties of the model are unknown.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    name: str
    model_type: str
    fingerprint: str
    storage: str = Field(description="the quantization that the config states, or none")
    files: int
    bytes: int
    tensors: int
    dtypes: dict[str, int]
    formats: dict[str, int]
    compiles: bool
    why_not: str | None
    encoder_decoder: bool | None = None
    layers: list[LayerFound] = Field(default=[])
    expert_bytes: int | None = None
    parameters: int | None = Field(default=None, description="weights that the model uses")
    active_parameters: int | None = Field(default=None, description="the same with only the chosen experts")
    tied: dict[str, str] = Field(default={})
    unused: list[str] = Field(default=[])
    vocabulary: int | None = None
    context_length: int | None = None
    tokenizer: bool
    end_of_text: list[int] | None = None
    remarks: list[str]


def inspected(checkpoint: Checkpoint) -> CheckpointFound:
    """A description of ``checkpoint``, as far as possible. Reads only headers and the ends of tensors."""
    found = CheckpointFound(
        name=checkpoint.name,
        model_type=checkpoint.model_type,
        fingerprint=checkpoint.fingerprint,
        storage=checkpoint.quantization or "none",
        files=len(checkpoint.files),
        bytes=sum(checkpoint.bytes_by_dtype.values()),
        tensors=len(checkpoint.names),
        dtypes=checkpoint.bytes_by_dtype,
        formats=checkpoint.bytes_by_format,
        compiles=False,
        why_not=None,
        tokenizer=(checkpoint.path / "tokenizer.json").is_file(),
        remarks=list(checkpoint.remarks),
    )
    try:
        model = Model.of(checkpoint)
        told = vocabulary(model)
    except UserError as error:
        return found.model_copy(update={"why_not": str(error)})
    no_engine = why_no_engine(model)
    layers = [
        LayerFound(
            index=layer.index,
            name=layer.name,
            **layer.geometry.model_dump(include={"experts", "top_k", "hidden", "intermediate", "activation"}),
            stored=_stored(model, layer),
            bytes=model.stored_bytes[layer.name],
        )
        for layer in model.layers
    ]
    experts = sum(layer.geometry.experts * layer.geometry.expert_weights for layer in model.layers)
    active = sum(layer.geometry.top_k * layer.geometry.expert_weights for layer in model.layers)
    return found.model_copy(
        update={
            "compiles": no_engine is None,
            "why_not": no_engine,
            "encoder_decoder": bool(model.config.is_encoder_decoder),
            "layers": layers,
            "expert_bytes": sum(layer.bytes for layer in layers),
            "parameters": model.parameter_count,
            "active_parameters": model.parameter_count - experts + active,
            "tied": model.agreement.tied,
            "unused": [*model.agreement.unused, *model.agreement.other_parts, *checkpoint.absent],
            "vocabulary": told["vocabulary"],
            "context_length": told["context_length"],
            "end_of_text": told["end_of_text"],
            "remarks": list(model.remarks),
        }
    )


def _stored(model: Model, layer: MoeLayer) -> str:
    """The storage formats of a layer's experts or, if none is quantized, the format of most experts."""
    quantized = {weight.format for weight in model.stored_experts(layer) if not isinstance(weight, Plain)}
    return ", ".join(sorted(quantized)) or model.agreement.formats[layer.index]
