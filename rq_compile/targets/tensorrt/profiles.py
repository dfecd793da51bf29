"""Optimization profiles: the shapes that an engine accepts, and those that its kernels are chosen for."""

import math
from typing import Self

import onnx
from pydantic import Field, model_validator

from rq_compile.errors import UserError
from rq_compile.files import Document

Shapes = dict[str, tuple[list[int], list[int], list[int]]]
GROWTH = 4  # a default profile accepts up to this many times the batch and the sequence it is made for
# The most attention scores of a layer in a default profile: 4 GiB in 16 bits.
MOST_SCORES = 2**31


class Range(Document):
    """From ``least`` to ``most``; kernels are chosen for ``best``."""

    least: int = Field(ge=0, lt=2**31)
    best: int = Field(ge=0, lt=2**31)
    most: int = Field(ge=1, lt=2**31)

    @model_validator(mode="after")
    def in_order(self) -> Self:
        if not self.least <= self.best <= self.most:
            raise ValueError(f"{self.least}:{self.best}:{self.most} is not in order")
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """``8`` or ``1:8:32``.

        Raises:
            ValueError: it has neither form, or is not in order.
        """
        numbers = [int(number) for number in text.split(":")]
        if len(numbers) not in (1, 3):
            raise ValueError(f"{text} is neither one number nor three")
        least, best, most = numbers * (3 // len(numbers))
        return cls(least=least, best=best, most=most)

    def __str__(self) -> str:
        return f"{self.least}:{self.best}:{self.most}"


class Profile(Document):
    """Sequences per batch, new tokens per sequence, and tokens per sequence that are already in the cache."""

    batch: Range
    sequence: Range
    past: Range

    @property
    def most_tokens(self) -> int:
        return self.batch.most * self.sequence.most

    def most_scores(self, heads: int) -> int:
        """Attention scores of one layer at the largest sizes. Scratch memory grows with them."""
        return self.most_tokens * heads * (self.past.most + self.sequence.most)

    def __str__(self) -> str:
        return f"batch={self.batch},sequence={self.sequence},past={self.past}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """``batch=1:8:32,sequence=1,past=1:256:2047``.

        Raises:
            UserError: it does not have that form.
        """
        try:
            parts = [part.split("=") for part in text.split(",")]
            pairs = dict(parts)
            if len(pairs) < len(parts):
                raise ValueError("an axis is given twice")
            profile = cls(**{axis: Range.parse(value) for axis, value in pairs.items()})
            if not (profile.batch.least and profile.sequence.least):
                raise ValueError("batch and sequence must be at least 1")
        except ValueError as error:
            raise UserError(
                f"--profile {text} is not a profile; write, for example, batch=1:8:32,sequence=1:256:1024,past=0:0:1024", 2
            ) from error
        return profile

    def shapes(self, model: onnx.ModelProto) -> Shapes:
        """The smallest, best and largest shape of every input of ``model``, whose free axes are named as in ``export_graph``."""
        axes = {"batch": self.batch, "sequence": self.sequence, "past": self.past}
        shapes: Shapes = {}
        for value in model.graph.input:
            dimensions = value.type.tensor_type.shape.dim
            least, best, most = ([_size(d, axes, end) for d in dimensions] for end in ("least", "best", "most"))
            shapes[value.name] = (least, best, most)
        return shapes


def default_profiles(batch: int, sequence: int, context: int | None, heads: int = 1) -> list[Profile]:
    """One profile for prompts and one for decoding, for the workload that the model was calibrated with: ``batch`` texts of
    ``sequence`` tokens, in a context of up to ``context`` tokens.

    Neither has more than ``MOST_SCORES`` attention scores for ``heads`` heads. To stay below that, the largest cache of prompts
    is reduced first, then the largest batch, and the largest sequence last.
    """
    longest = max(context or GROWTH * sequence, 2)
    sequence, room = min(sequence, longest - 1), max(1, MOST_SCORES // heads)
    most = min(GROWTH * sequence, longest, math.isqrt(room))
    prompts = Range(least=1, best=min(sequence, most), most=most)
    batches = _batches(batch, room // most**2)
    cached = min(longest - 1, room // (batches.most * most) - most)
    past = min(longest - 1, room)
    return [
        Profile(batch=batches, sequence=prompts, past=Range(least=0, best=0, most=max(1, cached))),
        Profile(
            batch=_batches(batch, room // (past + 1)),
            sequence=Range(least=1, best=1, most=1),
            past=Range(least=1, best=min(sequence, past), most=past),
        ),
    ]


def _batches(batch: int, most: int) -> Range:
    most = max(1, min(GROWTH * batch, most))
    return Range(least=1, best=min(batch, most), most=most)


def _size(dimension: onnx.TensorShapeProto.Dimension, axes: dict[str, Range], end: str) -> int:
    if not dimension.dim_param:
        return dimension.dim_value
    return sum(getattr(axes[name], end) for name in dimension.dim_param.split("_and_"))
