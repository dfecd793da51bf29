"""A checkpoint, opened once, with everything that later stages need from it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rq_compile.architectures import generation
from rq_compile.architectures.agreement import Agreement, check_names, compare
from rq_compile.architectures.configuration import model_config
from rq_compile.architectures.families import FAMILIES, Family
from rq_compile.architectures.layers import (
    ExpertWeights,
    MoeLayer,
    Projection,
    expert_bias,
    expert_matrix,
    expert_numbers,
    moe_layers,
)
from rq_compile.architectures.quiet import quiet_transformers
from rq_compile.checkpoint.chat_template import chat_template_source
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.checkpoint.storage.weight import Plain, Weight
from rq_compile.checkpoint.tokenizer import read_tokenizer
from rq_compile.quantization.formats import Format
from rq_compile.quantization.source_numbers import SourceNumbers

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedModel

    from rq_compile.architectures.traced import TracedWeights

EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint with its family, its transformers config (every default filled in) and its MoE layers by index.

    Non-expert weights are named by their parameter in the transformers model, experts by layer and number. Opening a model only
    reads headers. ``read``, ``expert``, ``matrix`` and ``bias`` read the requested weights, again with every call.
    """

    checkpoint: Checkpoint
    family: Family | None
    config: "PretrainedConfig"
    layers: tuple[MoeLayer, ...]
    without_weights: "PreTrainedModel" = field(repr=False)
    agreement: Agreement = field(repr=False)
    _traced: "TracedWeights | None" = field(default=None, repr=False)

    @classmethod
    def open(cls, path: Path | str) -> "Model":
        """Read the config and the headers of all shards, and compare them. No weights are read.

        Raises:
            UserError: see ``Checkpoint.open`` and ``of``.
        """
        return cls.of(Checkpoint.open(path))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Model":
        """
        Raises:
            UserError: see ``check_names``, ``model_config``, ``TracedWeights.of``, ``moe_layers`` and ``compare``.
        """
        with quiet_transformers():
            return cls._of(checkpoint)

    @classmethod
    def _of(cls, checkpoint: Checkpoint) -> "Model":
        family = FAMILIES.get(checkpoint.model_type)
        if family is None:
            from rq_compile.architectures.traced import TracedWeights

            config = model_config(checkpoint)
            traced = TracedWeights.of(checkpoint, config)
            return cls(checkpoint, None, config, traced.layers, traced.model, traced.agreement(), traced)
        check_names(checkpoint, family)
        config = model_config(checkpoint)
        layers = tuple(moe_layers(checkpoint, family, config))

        from rq_compile.architectures.load import built_without_weights

        empty = built_without_weights(checkpoint, config)
        return cls(checkpoint, family, config, layers, empty, compare(checkpoint, family, layers, empty))

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.checkpoint.name

    @property
    def model_type(self) -> str:
        return self.checkpoint.model_type

    @property
    def fingerprint(self) -> str:
        """See ``Checkpoint.fingerprint``."""
        return self.checkpoint.fingerprint

    @property
    def version(self) -> str:
        """See ``Checkpoint.version``."""
        return self.checkpoint.version

    @property
    def dtype(self) -> Format:
        """The format of most weights of the experts. For quantized weights, this is the format in which they are read."""
        return self.agreement.format

    @property
    def text_config(self) -> "PretrainedConfig":
        """The config of the language model, also in a multimodal model."""
        return self.config.get_text_config()

    @property
    def stated(self) -> dict[str, Any]:
        """``config.json`` as it is."""
        return self.checkpoint.config

    @property
    def extra_layers(self) -> int:
        """Number of multi-token-prediction layers, which engines do not have."""
        stated = (self.stated.get(key) for key in EXTRA_LAYERS)
        return next((count for count in stated if type(count) is int and count > 0), 0)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a ``tokenizer.json``."""
        return (self.path / "tokenizer.json").is_file()

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """
        Raises:
            UserError: see ``read_tokenizer``.
        """
        return read_tokenizer(self.path)

    @cached_property
    def end_of_text(self) -> list[int]:
        """The tokens that end a text; empty if there are none.

        Raises:
            UserError: see ``generation.end_of_text``.
        """
        return generation.end_of_text(self.checkpoint)

    @cached_property
    def sampling(self) -> dict[str, float]:
        """How tokens are chosen, unless a request says otherwise: values of ``SamplingParams``.

        Raises:
            UserError: see ``generation.sampling``.
        """
        return generation.sampling(self.checkpoint)

    @cached_property
    def chat_template(self) -> str | None:
        """The source of the chat template; None if there is none, or no tokenizer.

        Raises:
            UserError: see ``chat_template_source``.
        """
        return chat_template_source(self.path) if self.has_tokenizer else None

    @cached_property
    def decoder_start(self) -> int | None:
        """The first token of an encoder-decoder's decoder.

        Raises:
            UserError: see ``generation.end_of_text``.
        """
        start = generation.decoder_start(self.checkpoint)
        return getattr(self.config, "decoder_start_token_id", None) if start is None else start

    @cached_property
    def parameter_count(self) -> int:
        """Number of stored weights, without those that the model does not use."""
        return sum(self.checkpoint.size(name) for name in self.used)

    @cached_property
    def quantized(self) -> bool:
        """Whether the checkpoint stores experts in a format that must be decoded."""
        return any(not isinstance(weight, Plain) for layer in self.layers for weight in self.stored_experts(layer))

    @cached_property
    def stored_bytes(self) -> dict[str, int]:
        """Layer name -> bytes of all its experts as stored in the checkpoint, including scales, zero points and biases."""
        return {layer.name: sum(weight.bytes for weight in self.stored_experts(layer)) for layer in self.layers}

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts of all layers, as stored in the checkpoint."""
        return sum(self.stored_bytes.values())

    @property
    def largest_layer_bytes(self) -> int:
        """Bytes of all experts of the largest MoE layer, in ``dtype``, or in 16 bits if they are quantized."""
        dtype = "bf16" if self.quantized else self.dtype
        return max(layer.geometry.experts * layer.geometry.expert_bytes(dtype) for layer in self.layers)

    def stored_experts(self, layer: MoeLayer) -> list[Weight]:
        """The stored weights of the experts of ``layer``: one for each expert, or one for all."""
        return [self.checkpoint.weight(name) for name in self.agreement.experts[layer.index]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all non-expert weights: parameters and persistent buffers."""
        return tuple(self.agreement.tensors)

    @cached_property
    def used(self) -> list[str]:
        """The checkpoint's tensors that the model uses."""
        unused = set(self.agreement.unused)
        return [name for name in self.checkpoint.names if name not in unused]

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence about each difference between config and tensors that is not an error, and one if no token ends a text.

        Raises:
            UserError: see ``end_of_text``.
        """
        endless = () if self.end_of_text else ("no token ends a text (eos_token_id): generation stops at the requested length",)
        return (*self.agreement.remarks, *endless)

    def tensor(self, name: str) -> str:
        """The checkpoint's tensor of a non-expert weight, if the weight is one unchanged tensor. Tied weights share one."""
        return self.agreement.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a non-expert weight."""
        return self._traced.parameter(name).shape if self._traced else self.checkpoint.shape(self.tensor(name))

    def stored(self, name: str) -> StoredTensor | None:
        """The stored tensor of a non-expert weight; None if the weight is decoded, or computed from several tensors or a part."""
        weight = self.checkpoint.weight(self.tensor(name)) if self.tensor(name) in self.checkpoint else None
        return weight.stored if isinstance(weight, Plain) else None

    def source_bytes(self, name: str) -> int:
        """Bytes that are read, and decoded, for a non-expert weight."""
        if self._traced:
            return self._traced.source_bytes(self._traced.parameter(name))
        return self.checkpoint.source_bytes(self.tensor(name))

    def dtype_of(self, name: str) -> np.dtype:
        """The dtype that ``read`` returns for a non-expert weight, see ``Checkpoint.dtype_of``."""
        if self._traced:
            return self._traced.dtype_of(self._traced.parameter(name))
        return self.checkpoint.dtype_of(self.tensor(name))

    def read(self, name: str) -> np.ndarray:
        """A non-expert weight, decoded, in ``dtype_of`` it.

        Raises:
            UserError: a value of it is not finite.
        """
        if self._traced:
            return self._traced.read(self._traced.parameter(name))
        return self.checkpoint.read(self.tensor(name))

    def matrix(self, layer: MoeLayer, expert: int, projection: Projection) -> np.ndarray:
        """One of the two matrices of a logical expert, in the layout of ``ExpertWeights``. Reads nothing else."""
        if self._traced:
            return self._traced.matrix(layer, expert, projection)
        assert self.family is not None
        return expert_matrix(self.checkpoint, self.family, layer, expert, projection)

    def source_numbers(self, layer: MoeLayer, expert: int, projection: Projection) -> SourceNumbers | None:
        """The numbers and scales of such a matrix, if the checkpoint stores it in this form. Reads nothing else."""
        if self._traced:
            return self._traced.source_numbers(layer, expert, projection)
        assert self.family is not None
        return expert_numbers(self.checkpoint, self.family, layer, expert, projection)

    def bias(self, layer: MoeLayer, expert: int, projection: Projection) -> np.ndarray | None:
        """The bias of such a matrix, or None. Reads nothing else."""
        if self._traced:
            return self._traced.bias(layer, expert, projection)
        assert self.family is not None
        return expert_bias(self.checkpoint, self.family, layer, expert, projection)

    def expert(self, layer: MoeLayer, expert: int) -> ExpertWeights:
        """The weights of one logical expert. Reads no other expert."""
        up, down = self.matrix(layer, expert, "up"), self.matrix(layer, expert, "down")
        return ExpertWeights(
            up,
            down,
            self.bias(layer, expert, "up"),
            self.bias(layer, expert, "down"),
            up_numbers=self.source_numbers(layer, expert, "up"),
            down_numbers=self.source_numbers(layer, expert, "down"),
        )
