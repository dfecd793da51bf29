"""Weights and constants in 16 bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from rq_compile.rewrite.halves import in_half
from rq_compile.rewrite.weights import ExternalWeight, Piece, Section


@dataclass(frozen=True)
class Version:
    """An external weight, stored as ``name`` in ``dtype``; ``is_scale``: it is a scale of quantized weights."""

    name: str
    dtype: np.dtype
    is_scale: bool = False


# By the weight's name; a weight without an entry stays unchanged.
Versions = Mapping[str, Sequence[Version]]


def narrowed(values: np.ndarray, half: np.dtype) -> np.ndarray:
    """A constant in ``half``.

    A number that stands for minus infinity in a mask becomes half of the lowest number of ``half``: additions to it never
    overflow, and the softmax of a fully masked row is defined.
    """
    values, limit = values.astype(np.float32), np.float32(ml_dtypes.finfo(half).max)
    return np.where(np.abs(values) > limit, np.sign(values) * limit / 2, values).astype(half)


def in_versions(section: Section, versions: Versions) -> Section:
    """``section`` with its weights in the versions requested, which are computed when they are written.

    Its pieces raise a UserError for a weight that 16 bits cannot hold. A scale never becomes zero, which TensorRT would reject.
    """
    made = {weight.name: tuple(_versions(weight, versions)) for weight in section.weights}
    weights = tuple(weight for group in made.values() for weight, _ in group)
    return Section(section.name, weights, tuple(_piece(piece, made) for piece in section.pieces))


_Made = tuple[ExternalWeight, Version | None]


def _versions(weight: ExternalWeight, versions: Versions) -> list[_Made]:
    if weight.name not in versions:
        return [(weight, None)]
    return [(replace(weight, name=version.name, dtype=version.dtype), version) for version in versions[weight.name]]


def _piece(piece: Piece, made: Mapping[str, Sequence[_Made]]) -> Piece:
    groups = [made[weight.name] for weight in piece.weights]

    def values() -> tuple[np.ndarray, ...]:
        computed = zip(piece.values(), groups, strict=True)
        return tuple(_converted(array, version) if version else array for array, group in computed for _, version in group)

    return Piece(tuple(weight for group in groups for weight, _ in group), values, 2 * piece.memory)


def _converted(values: np.ndarray, version: Version) -> np.ndarray:
    made = in_half(values.astype(np.float32, copy=False), version.dtype, version.name)
    if version.is_scale:
        # The scale of a block of zeros, for which any scale gives the same result, or a scale that is too small for 16 bits.
        made[made == 0] = ml_dtypes.finfo(version.dtype).smallest_subnormal
    return made
