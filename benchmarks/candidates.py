"""Slot formats that were tried, as values that a block of weights may take, and GPTQ for any of them.

A candidate has a codebook, whose values are multiplied by a scale for each block of a row. ``rounded`` is Algorithm 1 of GPTQ
(Frantar et al., arXiv 2210.17323) in fp32, for many matrices at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

DAMPING = 0.01
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The 16 values of NF4, quantiles of a normal distribution (Dettmers et al., arXiv 2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
Fitted = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """``bits`` of a weight and ``block_bits`` of a block: its scale and, if ``asymmetric``, its zero point.

    ``codebook``: ascending values, of which 1 is the largest magnitude; None: learned for each layer and projection. The scale is
    one of ``fractions`` between ``smallest`` and 1 times the one that puts the largest weight on 1; or, if ``powers_of_two``, one
    of the powers of two beside it.
    """

    name: str
    bits: int
    codebook: tuple[float, ...] | None = None
    block_bits: int = 32
    fractions: int = 17
    smallest: float = 0.5
    asymmetric: bool = False
    powers_of_two: bool = False
    compensates: bool = True  # GPTQ, else to the nearest

    def width(self, block: int) -> float:
        """Bits of a weight, with its share of what its block stores."""
        return self.bits + self.block_bits / block

    def fit(self, part: torch.Tensor, importance: torch.Tensor, codebook: torch.Tensor) -> Fitted:
        """Rounds columns ``[..., rows]`` of blocks ``part [..., rows, block]`` with the best scale of each block."""
        if self.asymmetric:
            return self._fit_asymmetric(part, importance)
        peak = part.gather(-1, part.abs().argmax(-1, keepdim=True))
        if self.powers_of_two:
            whole = torch.exp2(torch.floor(torch.log2(peak.abs().clamp(min=1e-30))))
            scales = whole * torch.tensor(
                [0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
            )  # 6 and 1 are the largest value: 1.5 times a power of two
            scales = scales[..., 1::2]
        else:
            scales = peak * torch.linspace(1.0, self.smallest, self.fractions)
        scales = torch.where(scales == 0, 1.0, scales)
        lost = torch.stack(
            [
                ((_nearest(part / scale, codebook) * scale - part).square() * importance).sum(-1)
                for scale in (scales[..., i, None] for i in range(scales.shape[-1]))
            ],
            -1,
        )
        scale = scales.gather(-1, lost.argmin(-1, keepdim=True))[..., 0]
        return lambda column: _nearest(column / scale, codebook) * scale

    def _fit_asymmetric(self, part: torch.Tensor, importance: torch.Tensor) -> Fitted:
        last = 2**self.bits - 1
        low, high = part.amin(-1).clamp(max=0), part.amax(-1).clamp(min=0)
        best: tuple[torch.Tensor, ...] | None = None
        for fraction in torch.linspace(1.0, self.smallest, self.fractions):
            scale = torch.where(high > low, (high - low) * fraction / last, 1.0)
            zero = torch.clamp(torch.round(-low * fraction / scale), 0, last)
            q = torch.clamp(torch.round(part / scale[..., None]) + zero[..., None], 0, last)
            lost = (((q - zero[..., None]) * scale[..., None] - part).square() * importance).sum(-1)
            if best is None:
                best = lost, scale, zero
            else:
                less = lost < best[0]
                best = tuple(torch.where(less, new, old) for new, old in zip((lost, scale, zero), best, strict=True))
        assert best is not None
        _, scale, zero = best
        return lambda column: (torch.clamp(torch.round(column / scale) + zero, 0, last) - zero) * scale


def integers(bits: int) -> tuple[float, ...]:
    """As in int4: the scale's sign puts the largest weight on the side that has one value more."""
    half = 2 ** (bits - 1)
    return tuple(q / half for q in range(1 - half, half + 1))


def _both_signs(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted({sign * value / max(values) for value in values for sign in (1, -1)}))


def _e4m3() -> tuple[float, ...]:
    values = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return _both_signs(tuple(float(value) for value in values))


CANDIDATES = (
    Candidate("int8", 8, tuple(q / 127 for q in range(-127, 128)), fractions=5, smallest=0.9),
    Candidate("fp8", 8, _e4m3(), fractions=1, compensates=False),
    Candidate("int4", 4, integers(4), smallest=0.6),
    Candidate("int4 nearest", 4, integers(4), fractions=1, compensates=False),
    Candidate("int4 zero point", 4, asymmetric=True, block_bits=36),
    Candidate("nf4", 4, NF4),
    Candidate("e2m1", 4, _both_signs(E2M1)),
    Candidate("mxfp4", 4, _both_signs(E2M1), block_bits=8, powers_of_two=True),
    Candidate("learned 4", 4),
    Candidate("int3", 3, integers(3)),
    Candidate("int3 nearest", 3, integers(3), fractions=1, compensates=False),
    Candidate("int3 zero point", 3, asymmetric=True, block_bits=35),
    Candidate("learned 3", 3),
    Candidate("int2", 2, integers(2), smallest=0.3),
    Candidate("int2 nearest", 2, integers(2), fractions=1, compensates=False),
    Candidate("int2 zero point", 2, asymmetric=True, block_bits=34, smallest=0.3),
    Candidate("learned 2", 2, smallest=0.3),
)
BY_NAME = {candidate.name: candidate for candidate in CANDIDATES}


def rounded(
    weights: torch.Tensor, moment: torch.Tensor, candidate: Candidate, block: int, codebook: torch.Tensor | None = None
) -> torch.Tensor:
    """The values of fp32 ``weights [matrices, rows, columns]``; ``moment [matrices, columns, columns]`` of their inputs."""
    columns = weights.shape[-1]
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(columns)
    damped = torch.where(mean > 0, moment / mean.clamp(min=1e-30) + DAMPING * eye, eye)
    importance = damped.diagonal(dim1=-2, dim2=-1)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True)
    feedback = (upper / upper.diagonal(dim1=-2, dim2=-1)[..., None]).float()
    levels = codebook if codebook is not None else torch.tensor(candidate.codebook or (0.0,))
    left, kept = weights.clone(), torch.empty_like(weights)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        fitted = candidate.fit(left[..., start:end], importance[:, None, start:end], levels)
        for column in range(start, end):
            kept[..., column] = fitted(left[..., column])
            if candidate.compensates and column + 1 < columns:
                change = left[..., column] - kept[..., column]
                left[..., column + 1 :] -= change[..., None] * feedback[:, None, column, column + 1 :]
    return kept


def learned(weights: torch.Tensor, moment: torch.Tensor, bits: int, block: int, rounds: int = 12) -> torch.Tensor:
    """The codebook with least squared error of ``weights [matrices, rows, columns]`` divided by their scales, weighted by the
    moment's diagonal (Lloyd, Least Squares Quantization in PCM, 1982)."""
    columns = weights.shape[-1]
    parts = [weights[..., start : start + block] for start in range(0, columns, block)]
    diagonal = moment.diagonal(dim1=-2, dim2=-1)[:, None].expand_as(weights)
    values, weight = [], []
    for place, part in enumerate(parts):
        peak = part.gather(-1, part.abs().argmax(-1, keepdim=True))
        values.append((part / torch.where(peak == 0, 1.0, peak)).flatten())
        weight.append((diagonal[..., place * block : place * block + part.shape[-1]] * peak.square()).flatten())
    value, importance = torch.cat(values), torch.cat(weight)
    codebook = torch.quantile(value[torch.randperm(len(value), generator=torch.Generator().manual_seed(0))[:100_000]],
                              (torch.arange(2**bits) + 0.5) / 2**bits)  # fmt: skip
    for _ in range(rounds):
        nearest = torch.bucketize(value, (codebook[1:] + codebook[:-1]) / 2)
        total = torch.zeros(2**bits).index_add_(0, nearest, importance)
        sums = torch.zeros(2**bits).index_add_(0, nearest, importance * value)
        codebook = torch.where(total > 0, sums / total.clamp(min=1e-30), codebook).sort().values
    return codebook


def _nearest(values: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return codebook[torch.bucketize(values.contiguous(), (codebook[1:] + codebook[:-1]) / 2)]
