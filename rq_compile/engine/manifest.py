"""The manifest of an engine, written beside it as ``<engine stem>.json``: everything that is needed to load and run it."""

from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from rq_compile.bounds import MOST_RANKS, Count, FileName, Sha256, TokenId
from rq_compile.engine.library import OpLibrary
from rq_compile.files import Document
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import DenseFormat
from rq_compile.versions import Upgrade, Versioned

LoweringName = Literal["native", "stock", "batched", "ranks", "cuda"]
Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider"]


class EngineFile(Document):
    """A file of the engine, by its name in the engine's folder."""

    name: FileName
    sha256: Sha256
    bytes: Count


class CacheTensor(Document):
    """One fp32 tensor of the cache: graph input ``past`` and graph output ``present``.

    Keys and values (``past_key_values.{i}.key``) are ``[batch, heads, past, dimension]``. Layers without attention keep states
    of a fixed size: ``[batch, ...]``. ``shape`` names the free dimensions. A size may be 0, for keys without a rotated part.
    """

    past: str
    present: str
    shape: list[Count | Literal["batch", "past"]] = Field(min_length=1, max_length=8)
    in_place: bool = Field(
        default=False,
        description="whether past may have room for more tokens than the attention mask counts: the new ones are then written "
        "where they belong, present has the shape of past, and one buffer can serve as both",
    )

    def empty(self, batch: int) -> np.ndarray:
        """The initial tensor of a text: no keys and values, or states of zeros."""
        sizes = {"batch": batch, "past": 0}
        return np.zeros([size if isinstance(size, int) else sizes[size] for size in self.shape], np.float32)


class SamplingDefaults(Document):
    """How tokens are chosen unless a request says otherwise; the names are those of ``SamplingParams``. Temperature 0 always
    takes the most likely token."""

    temperature: float = Field(default=0.0, ge=0, le=1e6)
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=1e-6, le=1e6)


class RankFiles(Document):
    """The graph of one rank, and the weights of its experts."""

    graph: EngineFile
    weights: EngineFile


def _with_cache_shapes(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had only keys and values, described by heads and dimension."""
    for tensor in content.get("cache") or []:
        if isinstance(tensor, dict) and "heads" in tensor:
            tensor["shape"] = ["batch", tensor.pop("heads"), "past", tensor.pop("dimension", None)]
    return content


class Manifest(Versioned):
    """``op_library``: the op-set version of the custom-op library that the engine needs; None if it runs in any ONNX Runtime.
    ``op_library_name``: the name of that library; None in older engines, which need that of the CPU.

    ``slot_offsets[layer name]`` is the graph's int32 ``[slots + 1]`` tensor with the cumulative rows per slot, from which the
    load of the engine can be read; the lowering cuda has none, and with the lowering ranks it has the slots of one rank.
    ``replaced`` counts what was skipped, padded or replaced, by reason. ``licences`` are the licence texts from the checkpoint's
    folder; ``licence`` is what its model card declares.
    """

    called: ClassVar[str] = "manifest of an engine"
    command: ClassVar[str] = "rq-compile compile"
    upgrades: ClassVar[dict[int, Upgrade]] = {1: _with_cache_shapes}

    schema_version: Literal[2] = 2
    kind: Literal["engine"] = "engine"
    tool: str
    target: Literal["cpu", "cuda"] = "cpu"
    lowering: LoweringName
    graph: EngineFile
    weights: EngineFile
    ranks: list[RankFiles] = Field(
        default=[],
        max_length=MOST_RANKS,
        description="the files of each rank of an engine of several processes; graph is then that of rank 0, and weights are the "
        "non-expert weights, which all ranks read",
    )
    linked: list[EngineFile] = Field(
        default=[], description="shards of the checkpoint that also hold weights of the engine (--link-weights)"
    )
    tokenizer: EngineFile | None
    chat_template: EngineFile | None = Field(default=None, description="the template that turns a conversation into a prompt")
    special_tokens: dict[str, str] = Field(
        default={}, description="texts of special tokens by the names that the chat template uses, such as bos_token"
    )
    licences: list[EngineFile] = Field(default=[])
    licence: str | None = None
    op_library: int | None = Field(ge=1, le=1000)
    op_library_name: OpLibrary | None = None
    provider: Provider = Field(default="CPUExecutionProvider", description="ONNX Runtime's execution provider")
    activation_bits: Literal[8, 16, 32] = Field(
        default=32, description="bits of the activations of quantized weights: 8, or 16 or 32 for floats"
    )
    dense_format: DenseFormat = Field(
        default="fp32", description="format of non-expert matrices: as stored, int8, int4 (the head: int8) or fp32"
    )
    opset: int = Field(ge=1, le=1000)
    encoder_decoder: bool
    vocabulary: int = Field(ge=1, lt=2**31)
    start_of_text: TokenId | None = Field(
        default=None, description="the token that the tokenizer names as the beginning of a text"
    )
    end_of_text: list[TokenId]
    sampling: SamplingDefaults = Field(default=SamplingDefaults(), description="from the checkpoint's generation_config.json")
    context_length: int | None = Field(default=None, ge=1, lt=2**31, description="context length of the model, in positions")
    decoder_start: TokenId | None = None
    prefill_chunk: int | None = Field(
        default=None, ge=1, lt=2**31, description="tokens of a prompt that run in one step; null: the whole prompt"
    )
    padding_changes_logits: bool = Field(
        default=False,
        description="whether the logits of a sequence depend on the padding before it, so that sequences of different lengths "
        "cannot share a step",
    )
    cache: list[CacheTensor]
    recomputed_beyond: Count | None = Field(
        default=None, description="a cache of up to this many tokens is not continued beyond them: all tokens are computed again"
    )
    slot_offsets: dict[str, str]
    dense_bytes: Count
    expert_bytes: Count
    replaced: dict[str, Count] = Field(default={})
    remarks: list[str] = Field(default=[], description="differences between the checkpoint's config and tensors")
    plan: Plan

    @model_validator(mode="after")
    def _counts_all_layers_or_none(self) -> Self:
        layers = {layer.name for layer in self.plan.layers}
        if self.slot_offsets and (uneven := layers ^ self.slot_offsets.keys()):
            raise ValueError(f"slot_offsets and the layers of the plan differ in {min(uneven)}")
        return self

    @model_validator(mode="after")
    def _has_all_ranks_or_none(self) -> Self:
        if self.ranks and len(self.ranks) != self.plan.ranks:
            raise ValueError(f"the files of {len(self.ranks)} ranks do not fit the {self.plan.ranks} ranks of the plan")
        return self

    @property
    def files(self) -> list[EngineFile]:
        """All files except the manifest itself."""
        of_ranks = [file for rank in self.ranks for file in (rank.graph, rank.weights) if file != self.graph]
        files = (self.graph, self.weights, *of_ranks, *self.linked, self.tokenizer, self.chat_template, *self.licences)
        return [file for file in files if file is not None]
