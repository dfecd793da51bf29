"""Every storage format of published checkpoints, compared with the libraries that write it."""

from pathlib import Path

import numpy as np
import pytest
import tiny_storage
from safetensors.numpy import load_file

from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.checkpoint.mapped import mapped
from rq_compile.checkpoint.storage.weight import Plain


@pytest.fixture(scope="module", params=tiny_storage.FORMATS)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_storage.build(request.param, tmp_path_factory.mktemp(request.param))


def test_a_checkpoint_reads_as_if_it_had_never_been_quantized(stored: Path) -> None:
    checkpoint = Checkpoint.open(stored)
    expected = load_file(stored.parent / "dequantized" / "model.safetensors")
    assert checkpoint.names == sorted(expected)
    quantized = [weight for weight in checkpoint.weights() if not isinstance(weight, Plain)]
    assert any("experts" in weight.name for weight in quantized)
    whole = mapped(checkpoint, checkpoint.names)
    for name, values in expected.items():
        assert checkpoint.shape(name) == values.shape
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), values, err_msg=name)
        np.testing.assert_array_equal(whole[name].float().numpy(), values, err_msg=name)
    for weight in quantized:
        rows = weight.matrix_shape[0]
        everything = weight.decode(slice(0, rows))
        for part in (slice(0, 1), slice(3, 10), slice(rows - 5, rows), slice(7, 7)):
            np.testing.assert_array_equal(weight.decode(part), everything[part], err_msg=weight.name)
        index = weight.shape[0] - 1
        np.testing.assert_array_equal(weight.read(index), weight.read()[index], err_msg=weight.name)


def test_whole_numbers_times_their_scales_are_the_weight(stored: Path) -> None:
    for weight in Checkpoint.open(stored).weights():
        integers = weight.source_numbers(slice(2, 15))
        if integers is None:
            continue
        columns = integers.numbers.shape[1]
        scales = np.repeat(integers.scales, integers.group, axis=1)[:, :columns]
        np.testing.assert_array_equal(integers.numbers * scales, weight.decode(slice(2, 15)), err_msg=weight.name)
