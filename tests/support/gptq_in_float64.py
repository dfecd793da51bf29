"""GPTQ (Frantar et al., arXiv 2210.17323) as the paper writes it, without blocks, lanes or bf16."""

import numpy as np

from rq_compile.quantization.formats import BLOCK_FORMATS, Format


def gptq_in_float64(weights: np.ndarray, format: Format, moment: np.ndarray, block: int) -> np.ndarray:
    """Algorithm 1 of the paper for ``weights [rows, columns]``, column by column in float64, with the scales of
    ``rq_compile.quantization.gptq``."""
    damped = moment + 0.01 * moment.diagonal().mean() * np.eye(len(moment))
    factor = np.linalg.cholesky(np.linalg.inv(damped), upper=True)
    left, kept = weights.astype(np.float64), np.empty(weights.shape)
    rule = BLOCK_FORMATS[format]
    low, high, fractions = rule.least, rule.greatest, np.linspace(1.0, rule.smallest, rule.fractions)
    for column in range(weights.shape[1]):
        if column % block == 0:
            part = left[:, column : column + block]
            largest, smallest = part.max(1), part.min(1)
            end = (
                np.maximum(largest, -smallest) / high if low == -high else np.where(largest > -smallest, largest, smallest) / low
            )
            scales = end[:, None] * fractions
            tried = np.clip(np.rint(part[:, None] / scales[..., None]), low, high) * scales[..., None] - part[:, None]
            best = (tried**2 @ damped.diagonal()[column : column + block]).argmin(1)
            scale = scales[range(len(scales)), best]
        kept[:, column] = np.clip(np.rint(left[:, column] / scale), low, high) * scale
        error = (left[:, column] - kept[:, column]) / factor[column, column]
        left[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return kept
