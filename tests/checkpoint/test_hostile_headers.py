"""Headers of .safetensors files from an attacker or a broken download: opened completely, or rejected with one sentence."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hostile import PAIR, changed, one_sentence, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from rq_compile.checkpoint.safetensors_file import MAX_HEADER_BYTES, read_tensor, tensors_of
from rq_compile.errors import UserError

pytestmark = pytest.mark.quick


def test_reads_what_the_format_allows(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, **PAIR, "empty": {"dtype": "F64", "shape": [3, 0], "data_offsets": [12, 12]}}
    header["scalar"] = {"dtype": "U8", "shape": [], "data_offsets": [12, 13]}
    file = write(tmp_path / "x.safetensors", header, np.arange(13, dtype=np.uint8).tobytes())
    tensors = tensors_of(file)
    assert list(tensors) == ["a", "b", "empty", "scalar"]
    assert read_tensor("scalar", tensors["scalar"]) == 12
    assert read_tensor("empty", tensors["empty"]).shape == (3, 0)
    assert read_tensor("b", tensors["b"], 1).tobytes() == bytes([10, 11])


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (changed(data_offsets=[-4, 0]), "b does not have two ordered offsets"),
        (changed(data_offsets=[12, 8]), "b does not have two ordered offsets"),
        (changed(data_offsets=[8]), "b does not have two ordered offsets"),
        (changed(data_offsets=[8, 12, 16]), "b does not have two ordered offsets"),
        (changed(data_offsets=[8.0, 12.0]), "b does not have two ordered offsets"),
        (changed(data_offsets=["8", "12"]), "b does not have two ordered offsets"),
        (changed(data_offsets=[False, True]), "b does not have two ordered offsets"),
        (changed(data_offsets=None), "b does not have two ordered offsets"),
        (changed(data_offsets=[4, 8]), "b overlaps the tensor before it"),
        (changed(data_offsets=[0, 4]), "a overlaps the tensor before it"),
        (changed(data_offsets=[9, 13]), "is truncated: .* b ends at"),
        (changed(data_offsets=[2**63, 2**63 + 4]), "is truncated"),
        (changed(data_offsets=[10**30, 10**30 + 4]), "is truncated"),
        (changed(shape=[3]), r"the shape \[3\] of b, as BF16, does not fit its 4 bytes"),
        (changed(shape=[-2, -1]), "b does not have a shape of whole numbers"),
        (changed(shape=[2.0]), "b does not have a shape of whole numbers"),
        (changed(shape=[True, 2]), "b does not have a shape of whole numbers"),
        (changed(shape=2), "b does not have a shape of whole numbers"),
        (changed(shape=[1] * 33), "b does not have a shape of whole numbers"),
        (changed(shape=[2**62, 4]), "does not fit its 4 bytes"),
        (changed(shape=[2**62, 0], data_offsets=[8, 8]), "does not fit its 0 bytes"),
        (changed(dtype=16), "b has no dtype"),
        (changed(dtype="\x1b[2J"), "b has no dtype"),
        (changed(dtype="F8_E5M2", shape=[4]), "b in .* is stored as F8_E5M2, which is not supported"),
        (changed(dtype="F32"), "as F32, does not fit"),
        ({"a": PAIR["a"]}, "its last 4 bytes do not belong to a tensor"),
        ({"a": PAIR["a"], "b": {"dtype": "U8", "shape": [2], "data_offsets": [10, 12]}}, "b starts 2 bytes late"),
        ({**PAIR, "c": 1}, "is not a safetensors file"),
        ({**PAIR, "c": {}}, "is not a safetensors file"),
        ({**PAIR, "__metadata__": {"format": 1}}, "is not a safetensors file"),
        ({"a\nb": PAIR["a"], "b": PAIR["b"]}, "is not a safetensors file"),
        ({"\ud800": PAIR["a"], "b": PAIR["b"]}, "is not a safetensors file"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}', "its header names a twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "its header names dtype twice"),
        (b'{"x":' * 100_000, "is not a safetensors file"),
        (b"[" * 100_000, "is not a safetensors file"),
        (json.dumps(PAIR).encode("utf-16"), "is not a safetensors file"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, ' + b"9" * 5000 + b"]}}", "is not a safetensors file"),
    ],
)
def test_refuses_a_header(tmp_path: Path, header: object, words: str) -> None:
    file = write(tmp_path / "x.safetensors", header)
    with pytest.raises(UserError, match=words) as caught:
        tensors_of(file)
    assert str(file) in one_sentence(caught.value)
    assert caught.value.exit_status == 2


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as opened:
        opened.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        opened.truncate(8 + MAX_HEADER_BYTES + 1)  # without blocks on the disk
    with pytest.raises(UserError, match="its header has 100000001 bytes"):
        tensors_of(file)


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    """Opening it would block forever."""
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not a file"):
        tensors_of(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", PAIR)
    tensors = tensors_of(file)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    with pytest.raises(UserError, match="has become shorter while it was read: b is incomplete"):
        read_tensor("b", tensors["b"])


def opened_or_refused(file: Path) -> None:
    try:
        tensors = tensors_of(file)
    except UserError as error:
        one_sentence(error)
        return
    size = file.stat().st_size
    for name, tensor in tensors.items():
        assert 8 <= tensor.offset <= tensor.offset + tensor.bytes <= size
        with suppress(UserError):  # random bits are rarely all finite
            assert read_tensor(name, tensor).nbytes == tensor.bytes


fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@fuzzed
@given(content=st.binary(max_size=200), honest=st.booleans())
def test_any_bytes_are_opened_or_refused(tmp_path: Path, content: bytes, honest: bool) -> None:
    """As a whole file, and as a header of the right length."""
    file = tmp_path / "x.safetensors"
    if honest:
        write(file, content)
    else:
        file.write_bytes(content)
    opened_or_refused(file)


VALID = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}, {"format": "pt"})
PIECES = [
    b"-",
    b"9",
    b"0",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"1e9",
    b"null",
    b"true",
    b"\\u0000",
    b"F64",
    b"F4",
    b'"a":',
]


@fuzzed
@given(edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 3), st.sampled_from(PIECES)), max_size=4))
def test_a_mutated_file_is_opened_or_refused(tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    content = bytearray(VALID)
    for position, length, piece in edits:
        content[position : position + length] = piece
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    opened_or_refused(file)


entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E5M2", 3]),
        "shape": st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**63, True]), max_size=3) | st.none(),
        "data_offsets": st.lists(st.integers(-1, 16) | st.sampled_from([2**31, 2**64]), min_size=1, max_size=3),
    }
)


@fuzzed
@given(header=st.dictionaries(st.text(max_size=3), entry, max_size=3), length=st.integers(0, 16))
def test_a_made_up_header_is_opened_or_refused(tmp_path: Path, header: dict[str, Any], length: int) -> None:
    opened_or_refused(write(tmp_path / "x.safetensors", header, bytes(length)))
