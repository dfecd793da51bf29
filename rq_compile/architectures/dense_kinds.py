"""The kinds of non-expert modules. Documents name them, and reading a document must not need torch."""

from typing import Literal, get_args

DenseKind = Literal["attention", "shared experts", "dense ffn", "head", "embedding"]
DENSE_KINDS: tuple[DenseKind, ...] = get_args(DenseKind)
