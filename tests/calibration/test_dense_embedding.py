"""What rounding the embedding changes, against the sum over all tokens one by one."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rq_compile.architectures.model import Model
from rq_compile.calibration.dense import DenseMeasurements
from rq_compile.calibration.text import Batch, Rows
from rq_compile.quantization.formats import DENSE_QUANTIZED
from rq_compile.quantization.quantizer import stored


def test_every_token_counts_its_row_and_other_rows_do_not_matter(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = Model.open(tiny_checkpoint("olmoe"))
    rows, columns = model.shape("model.embed_tokens.weight")
    random = np.random.default_rng(0)
    table = random.standard_normal((rows, columns), dtype=np.float32)
    ids = random.integers(0, rows // 2, (2, 7))
    table[rows // 2 :] = np.inf  # of no token
    real = np.ones(ids.shape, bool)
    real[1, 4:] = False
    dense = DenseMeasurements(model, [Batch(0, Rows(ids, real, real))], "nearest")
    net: Any = SimpleNamespace(get_parameter=lambda name: torch.from_numpy(table))
    dense.embedding(net)
    (found,), _ = dense.take()
    tokens = table[ids[real]].astype(np.float64)
    assert np.isclose(found.square, np.square(tokens).sum())
    for format in DENSE_QUANTIZED:
        changes = stored(table[ids[real]], format) - tokens
        assert np.isclose(found.error[format], np.square(changes).sum())
