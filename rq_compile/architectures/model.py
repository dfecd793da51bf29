"""A checkpoint opened once: all that later stages ask of it."""

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
    expert_integers,
    expert_matrix,
    moe_layers,
)
from rq_compile.architectures.quiet import quiet_transformers
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.checkpoint.safetensors_file import StoredTensor
from rq_compile.checkpoint.storage.weight import Plain, Weight
from rq_compile.checkpoint.tokenizer import read_tokenizer
from rq_compile.quantization.formats import Format
from rq_compile.quantization.source_integers import SourceIntegers

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedModel

    from rq_compile.architectures.traced import TracedWeights

EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint with its family, its transformers config (every default filled in) and its MoE layers by index.

    Non-expert weights go by their parameter's name in the transformers model, experts by layer and number. Nothing but
    headers is read on opening; ``read``, ``expert``, ``matrix`` and ``bias`` read what is asked for, each time anew.
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
        """Read the config and the headers of all shards, and hold them against each other; no weights are read.

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
        """The format that most weights of the experts are stored in; of quantized ones, that they are read in."""
        return self.agreement.format

    @property
    def text_config(self) -> "PretrainedConfig":
        """The config of the language model, of a multimodal model too."""
        return self.config.get_text_config()

    @property
    def stated(self) -> dict[str, Any]:
        """``config.json`` as it is."""
        return self.checkpoint.config

    @property
    def extra_layers(self) -> int:
        """Layers that predict further tokens (multi-token prediction), which no engine has."""
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
        """The tokens that end a text; empty where none does.

        Raises:
            UserError: see ``generation.end_of_text``.
        """
        return generation.end_of_text(self.checkpoint)

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
        """Weights that are stored; those that have no part in the model are not counted."""
        return sum(self.checkpoint.size(name) for name in self.used)

    @cached_property
    def quantized(self) -> bool:
        """Whether the checkpoint stores experts in a format that has to be decoded."""
        return any(not isinstance(weight, Plain) for layer in self.layers for weight in self.stored_experts(layer))

    @cached_property
    def stored_bytes(self) -> dict[str, int]:
        """Layer name -> bytes of all its experts as the checkpoint stores them: scales, zero points and biases included."""
        return {layer.name: sum(weight.bytes for weight in self.stored_experts(layer)) for layer in self.layers}

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts of all layers, as the checkpoint stores them."""
        return sum(self.stored_bytes.values())

    @property
    def largest_layer_bytes(self) -> int:
        """Bytes of all experts of the MoE layer that has most, in ``dtype``, or in 16 bit where they are quantized."""
        dtype = "bf16" if self.quantized else self.dtype
        return max(layer.geometry.experts * layer.geometry.expert_bytes(dtype) for layer in self.layers)

    def stored_experts(self, layer: MoeLayer) -> list[Weight]:
        """What the experts of ``layer`` are stored in: a weight for each, or one for all."""
        return [self.checkpoint.weight(name) for name in self.agreement.experts[layer.index]]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all non-expert weights: parameters and persistent buffers."""
        return tuple(self.agreement.tensors)

    @cached_property
    def used(self) -> list[str]:
        """The checkpoint's tensors that have a part in the model."""
        unused = set(self.agreement.unused)
        return [name for name in self.checkpoint.names if name not in unused]

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence on each difference between config and tensors that is not an error, and where nothing ends a text.

        Raises:
            UserError: see ``end_of_text``.
        """
        endless = () if self.end_of_text else ("no token ends a text (eos_token_id): generation stops at the length asked for",)
        return (*self.agreement.remarks, *endless)

    def tensor(self, name: str) -> str:
        """What a non-expert weight is made of: the checkpoint's tensor, where it is one as it is. Tied weights have one."""
        return self.agreement.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a non-expert weight."""
        return self._traced.parameter(name).shape if self._traced else self.checkpoint.shape(self.tensor(name))

    def stored(self, name: str) -> StoredTensor | None:
        """Where a non-expert weight lies, and how; None where it is decoded, or computed from several tensors or from a part."""
        weight = self.checkpoint.weight(self.tensor(name)) if self.tensor(name) in self.checkpoint else None
        return weight.stored if isinstance(weight, Plain) else None

    def source_bytes(self, name: str) -> int:
        """Of what is read for a non-expert weight, and decoded."""
        if self._traced:
            return self._traced.source_bytes(self._traced.parameter(name))
        return self.checkpoint.source_bytes(self.tensor(name))

    def dtype_of(self, name: str) -> np.dtype:
        """What ``read`` gives for a non-expert weight, see ``Checkpoint.dtype_of``."""
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
        """One of the two matrices of a logical expert, as ``ExpertWeights`` has it; reads nothing else."""
        if self._traced:
            return self._traced.matrix(layer, expert, projection)
        assert self.family is not None
        return expert_matrix(self.checkpoint, self.family, layer, expert, projection)

    def integers(self, layer: MoeLayer, expert: int, projection: Projection) -> SourceIntegers | None:
        """The whole numbers and scales of such a matrix, where the checkpoint stores it so; reads nothing else."""
        if self._traced:
            return self._traced.integers(layer, expert, projection)
        assert self.family is not None
        return expert_integers(self.checkpoint, self.family, layer, expert, projection)

    def bias(self, layer: MoeLayer, expert: int, projection: Projection) -> np.ndarray | None:
        """The bias of such a matrix, or None; reads nothing else."""
        if self._traced:
            return self._traced.bias(layer, expert, projection)
        assert self.family is not None
        return expert_bias(self.checkpoint, self.family, layer, expert, projection)

    def expert(self, layer: MoeLayer, expert: int) -> ExpertWeights:
        """The weights of one logical expert; reads no other's."""
        up, down = self.matrix(layer, expert, "up"), self.matrix(layer, expert, "down")
        return ExpertWeights(
            up,
            down,
            self.bias(layer, expert, "up"),
            self.bias(layer, expert, "down"),
            up_integers=self.integers(layer, expert, "up"),
            down_integers=self.integers(layer, expert, "down"),
        )
