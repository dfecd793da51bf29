"""An engine's weights file: every weight is at its place in the layout, whatever computes it and however often it was
interrupted."""

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_compile.errors import UserError
from rq_compile.rewrite.weights import LOCATION, ExternalWeight, Piece, Section
from rq_compile.targets.partial_file import Job, Journal, resumable
from rq_compile.targets.weights_file import ALIGNMENT, WeightsFile, layout, locate, write_weights


def section(name: str, *arrays: np.ndarray, pieces: int = 1) -> Section:
    """Weights ``name.0``, ``name.1``, ... with these values; every piece has a part of each."""
    weights = tuple(ExternalWeight(f"{name}.{number}", array.dtype, array.shape) for number, array in enumerate(arrays))
    parts = zip(*(np.array_split(array, pieces) for array in arrays), strict=True)
    return Section(name, weights, tuple(Piece(weights, partial(tuple, part), 100) for part in parts))


def arrays_of(sections: list[tuple[np.ndarray, ...]]) -> dict[str, np.ndarray]:
    return {f"{number}.{i}": array for number, arrays in enumerate(sections) for i, array in enumerate(arrays)}


@given(
    shapes=st.lists(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 40)), min_size=1, max_size=3), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from([np.float32, np.float16, np.uint8, np.int64]), min_size=15, max_size=15),
    pieces=st.integers(1, 7),
    threads=st.integers(1, 3),
    memory=st.sampled_from([0, 250, 1 << 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_weight_is_found_where_it_is_said_to_be(
    shapes: list[list[tuple[int, int]]], dtypes: list[type], pieces: int, threads: int, memory: int, seed: int
) -> None:
    generator, kinds = np.random.default_rng(seed), iter(dtypes)
    given: list[tuple[np.ndarray, ...]] = [
        tuple(generator.integers(0, 255, shape).astype(next(kinds)) for shape in some) for some in shapes
    ]
    sections = [section(str(number), *arrays, pieces=pieces) for number, arrays in enumerate(given)]
    file = io.BytesIO()
    reported: list[tuple[int, int]] = []
    written = write_weights(sections, file, lambda done, total: reported.append((done, total)), threads=threads, memory=memory)
    content = file.getvalue()
    assert written.bytes == len(content) == layout(sections).bytes
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    for name, array in arrays_of(given).items():
        start = written.starts[name]
        assert start % ALIGNMENT == 0
        assert content[start : start + array.nbytes] == array.tobytes()
    assert reported[-1] == (written.bytes, written.bytes)
    assert reported == sorted(reported)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_weight_of_the_wrong_size_is_refused(rows: int) -> None:
    weight = ExternalWeight("a", np.dtype(np.float32), (3, 4))
    wrong = Section("a", (weight,), (Piece((weight,), lambda: (np.zeros((rows, 4), np.float32),), 0),))
    with pytest.raises(ValueError, match=rf"a has {16 * rows} bytes, but its shape \(3, 4\) needs 48"):
        write_weights([wrong], io.BytesIO())


def test_located_tensors_are_read_by_onnx(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    tensor = onnx.TensorProto(
        name="a.0", dims=values.shape, data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=LOCATION)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=[tensor]))
    with (tmp_path / "m.data").open("wb") as file:
        written = write_weights([section("z", np.ones(7, np.uint8)), section("a", values)], file)
    locate(model, written.starts, "m.data")
    found = {entry.key: entry.value for entry in model.graph.initializer[0].external_data}
    assert found == {"location": "m.data", "offset": str(ALIGNMENT), "length": "60"}
    onnx.save(model, tmp_path / "m.onnx")
    loaded = onnx.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(loaded.graph.initializer[0]), values)


class Full(io.BytesIO):
    def write(self, data: object) -> int:
        raise OSError(28, "No space left on device")


def test_no_thread_goes_on_when_writing_failed() -> None:
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="No space left") as caught:
        write_weights([section("a", np.ones((20, 4), np.uint8), pieces=20)], Full(), threads=1, memory=2000)
    assert caught.tb is not None  # it holds the frames of the failed call
    assert set(threading.enumerate()) == before


# Interrupted and resumed

VALUES = [np.random.default_rng(number).standard_normal((4, 300 * (number + 1))).astype(np.float32) for number in range(5)]
JOB: Job = {"plan": "p", "checkpoint": "c"}


class Run:
    """Writes VALUES, a section each, to ``path``; ``computed`` are the sections that were, ``said`` the sentences."""

    def __init__(self, path: Path, stop: int | None = None, error: BaseException | None = None, **options: Any) -> None:
        self.computed: list[int] = []
        self.said: list[str] = []
        self.stop, self.error = stop, error
        self.written: WeightsFile | None = None
        with resumable(path, options.pop("job", JOB), say=self.said.append, **options) as journal:
            self.written = write_weights(self._sections(), journal.file, threads=1, memory=0, journal=journal)

    def _sections(self) -> Iterator[Section]:
        for number, values in enumerate(VALUES):
            weight = ExternalWeight(str(number), values.dtype, values.shape)
            yield Section(str(number), (weight,), (Piece((weight,), partial(self._values, number), 1),))

    def _values(self, number: int) -> tuple[np.ndarray, ...]:
        if number == self.stop:
            raise self.error or OSError(28, "No space left on device")
        self.computed.append(number)
        return (VALUES[number],)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "w"
    Run(path)
    assert [file.name for file in path.parent.iterdir()] == ["w"]
    return path.read_bytes()


def interrupted(path: Path, stop: int, error: BaseException | None = None) -> None:
    with pytest.raises(BaseException):  # noqa: B017, PT011 - which is for the test to choose
        Run(path, stop, error)


@pytest.mark.parametrize("error", [None, MemoryError(), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_it_goes_on_where_it_was(tmp_path: Path, whole: bytes, stop: int, error: BaseException | None) -> None:
    path = tmp_path / "w"
    interrupted(path, stop, error)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".w.journal", ".w.partial"]
    run = Run(path)
    assert run.computed == list(range(stop, 5))
    assert run.said == [f"continuing w after {stop - 1}"]
    assert path.read_bytes() == whole
    assert run.written is not None
    assert (run.written.sha256, run.written.bytes) == (hashlib.sha256(whole).hexdigest(), len(whole))
    assert [file.name for file in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize(("stop", "error"), [(0, None), (0, KeyboardInterrupt()), (3, ValueError()), (3, UserError("no"))])
def test_what_cannot_be_continued_is_removed(tmp_path: Path, stop: int, error: BaseException | None) -> None:
    interrupted(tmp_path / "w", stop, error)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*w: No space left on device; free space") as caught:
        Run(tmp_path / "w", 3)
    assert caught.value.exit_status == 1


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_flipped_bit_is_found(tmp_path: Path, whole: bytes, damaged: int) -> None:
    path, partial = tmp_path / "w", tmp_path / ".w.partial"
    interrupted(path, 3)
    content = bytearray(partial.read_bytes())
    content[whole.index(VALUES[damaged].tobytes()) + 77] ^= 1
    partial.write_bytes(content)
    run = Run(path)
    assert run.computed == list(range(damaged, 5))
    assert f"{damaged} of the partial file differs from what was written" in run.said[-1]
    assert path.read_bytes() == whole


def test_it_is_interrupted_again_after_damage_was_found(tmp_path: Path, whole: bytes) -> None:
    path, partial = tmp_path / "w", tmp_path / ".w.partial"
    interrupted(path, 4)
    content = bytearray(partial.read_bytes())
    content[whole.index(VALUES[2].tobytes())] ^= 128
    partial.write_bytes(content)
    interrupted(path, 3)
    run = Run(path)
    assert run.computed == [3, 4]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("left", [0, 1000, 10_000])
def test_a_partial_file_that_was_cut_off(tmp_path: Path, whole: bytes, left: int) -> None:
    interrupted(tmp_path / "w", 4)
    (tmp_path / ".w.partial").write_bytes(whole[:left])
    assert len(Run(tmp_path / "w").computed) > 1
    assert (tmp_path / "w").read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 30])
def test_a_journal_that_was_cut_off(tmp_path: Path, whole: bytes, cut: int) -> None:
    """A line that was being written does not count, unless only its end of line is missing."""
    interrupted(tmp_path / "w", 4)
    journal = tmp_path / ".w.journal"
    journal.write_bytes(journal.read_bytes()[:-cut])
    run = Run(tmp_path / "w")
    assert run.computed == ([4] if cut == 1 else [3, 4])
    assert (tmp_path / "w").read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 30])
def test_it_is_interrupted_again_after_a_journal_was_cut_off(tmp_path: Path, whole: bytes, cut: int) -> None:
    journal = tmp_path / ".w.journal"
    interrupted(tmp_path / "w", 2)
    journal.write_bytes(journal.read_bytes()[:-cut])
    interrupted(tmp_path / "w", 4)
    assert Run(tmp_path / "w").computed == [4]
    assert (tmp_path / "w").read_bytes() == whole


def test_other_sections_in_the_same_job_are_kept_after_the_next_interruption(tmp_path: Path) -> None:
    """As another version of what exports the model may make them."""

    def written(*names: str, stop: bool = False) -> int:
        with resumable(tmp_path / "w", JOB) as journal:
            done = write_weights([section(name, VALUES[0]) for name in names], journal.file, journal=journal)
            if stop:
                raise KeyboardInterrupt
        return done.resumed

    with pytest.raises(KeyboardInterrupt):
        written("a", "b", "c", stop=True)
    with pytest.raises(KeyboardInterrupt):
        written("a", "x", "y", stop=True)
    assert written("a", "x", "y") == layout([section(name, VALUES[0]) for name in ("a", "x", "y")]).bytes
    assert [file.name for file in tmp_path.iterdir()] == ["w"]


def test_another_job_starts_over_and_says_so(tmp_path: Path, whole: bytes) -> None:
    interrupted(tmp_path / "w", 4)
    run = Run(tmp_path / "w", job={**JOB, "plan": "another"})
    assert run.computed == [0, 1, 2, 3, 4]
    assert run.said == ["the partial w was begun with another plan; starting over"]
    assert (tmp_path / "w").read_bytes() == whole


def test_it_starts_over_when_told_to(tmp_path: Path, whole: bytes) -> None:
    interrupted(tmp_path / "w", 4)
    assert Run(tmp_path / "w", fresh=True).computed == [0, 1, 2, 3, 4]
    assert (tmp_path / "w").read_bytes() == whole


def test_two_do_not_write_one_file(tmp_path: Path) -> None:
    with resumable(tmp_path / "w", JOB) as journal:
        with pytest.raises(UserError, match=r"another rq-compile is writing .*w; wait for it") as caught, other(tmp_path / "w"):
            pass
        assert caught.value.exit_status == 2
        write_weights([section("a", VALUES[0])], journal.file, journal=journal)
    assert (tmp_path / "w").read_bytes() == VALUES[0].tobytes()
    with other(tmp_path / "w"):
        pass


def other(path: Path) -> AbstractContextManager[Journal]:
    return resumable(path, JOB)
