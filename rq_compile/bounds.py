"""Bounds of the numbers and names in documents. A document out of these bounds is refused when it is read, with a sentence."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

# Above this, a double (in JSON, in JavaScript, in numpy's means) cannot hold every integer.
MOST_COUNTED = 2**53
MOST_EXPERTS = 2**14
MOST_RANKS = 2**12
MOST_LAYERS = 10_000
MOST_MEMORY = 1000.0

Count = Annotated[int, Field(ge=0, le=MOST_COUNTED)]
Size = Annotated[int, Field(ge=1, le=2**20, description="size of an axis of a matrix")]
ExpertNumber = Annotated[int, Field(ge=0, lt=MOST_EXPERTS)]
LayerNumber = Annotated[int, Field(ge=0, lt=MOST_LAYERS)]
Share = Annotated[float, Field(ge=0, le=1)]
# Relative to the mean, so 1 is perfect; at most the number of experts.
Imbalance = Annotated[float, Field(ge=1, le=MOST_EXPERTS)]
NonNegative = Annotated[float, Field(ge=0, le=1e15)]
# A product of bounded numbers that may exceed their bounds: beyond 1e15, one is as bad as another.
Saturated = Annotated[NonNegative, BeforeValidator(lambda value: min(value, 1e15) if isinstance(value, float) else value)]
Positive = Annotated[float, Field(gt=0, le=1e15)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


def _file_name(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in the document's folder")
    return name


def _path(name: str) -> str:
    if not name or "\0" in name:
        raise ValueError(f"{name!r} is not the path of a file")
    return name


FileName = Annotated[str, AfterValidator(_file_name)]
FilePath = Annotated[str, AfterValidator(_path)]
