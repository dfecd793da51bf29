"""File systems with restrictions, and outputs that survive a crash of the machine."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run, names, python, refused, writing

from rq_compile import file_systems, spill
from rq_compile.errors import UserError
from rq_compile.files import folder_written_beside, written_beside
from rq_compile.runtime.engine import Engine

UNSUPPORTED = ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EPERM"]
IDS = np.arange(3, 20, dtype=np.int64)[None]


def failing(code: str) -> Callable[..., None]:
    def fail(*_: object, **__: Any) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    return fail


@pytest.mark.parametrize("code", UNSUPPORTED)
@pytest.mark.parametrize("command", ["calibrate", "plan", "compile"])
def test_without_permissions_locks_and_syncing(
    rq_compile: Run, model: Path, stages: Path, out: Path, monkeypatch: pytest.MonkeyPatch, command: str, code: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(code))
    monkeypatch.setattr(os, "chmod", failing(code))
    monkeypatch.setattr(os, "fsync", failing(code))
    result = rq_compile(*writing(command, model, stages, out))
    assert result.exit_code == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "cannot" in line]
    assert len(said) == len(set(said)) == (3 if command == "compile" else 2)
    for line, what in zip(sorted(said), sorted(["change permissions", "lock files", "sync files"]), strict=False):
        assert f"the file system of {out} cannot" in line, what
        assert line.endswith("continuing without")
    assert names(out) == [name for name in names(out) if not name.startswith(".")]


def test_quiet_says_none_of_it(rq_compile: Run, stages: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chmod", failing("EPERM"))
    result = rq_compile("plan", stages / "calibration.json", "-o", out / "plan.json", "-q")
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_disk_that_fails_is_no_nicety(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing("EIO"))
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: Input/output error"), written_beside(out / "a.txt"):
        pass
    with pytest.raises(UserError, match=r"cannot write .*folder: Input/output error"), folder_written_beside(out / "folder"):
        pass
    assert names(out) == []


def test_without_hard_links_weights_are_written(
    rq_compile: Run, model: Path, stages: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing("EOPNOTSUPP"))
    result = rq_compile(*writing("compile", model, stages, out), "--link-weights")
    assert result.exit_code == 0, result.stderr
    assert f"the file system of {out} cannot hard-link files" in result.stderr
    assert names(out) == ["model.json", "model.onnx", "model.onnx.data", "model.tokenizer.json"]


# Syncing


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The names of the files that were synced and renamed, in order."""
    events: list[tuple[str, str]] = []
    replace, fsync = Path.replace, os.fsync

    def renamed(part: Path, target: Path) -> Path:
        events.append(("rename", Path(target).name))
        return replace(part, target)

    def synced(descriptor: int) -> None:
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(os, "fsync", synced)
    return events


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files come from /proc")
def test_files_are_synced_before_the_renaming_and_their_folder_after(out: Path, traced: list[tuple[str, str]]) -> None:
    with written_beside(out / "a.txt") as part:
        part.write_text("a")
    assert traced == [("sync", part.name), ("rename", "a.txt"), ("sync", out.name)]
    traced.clear()
    with folder_written_beside(out / "package") as folder:
        (folder / "1").mkdir()
        (folder / "1" / "model").write_text("a")
    assert traced == [
        ("sync", "model"),
        ("sync", "1"),
        ("sync", folder.name),
        ("rename", "package"),
        ("sync", out.name),
    ]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files come from /proc")
@pytest.mark.parametrize("suffix", [".onnx", ".plan"])
def test_every_file_of_an_engine_is_synced(
    rq_compile: Run, model: Path, stages: Path, out: Path, traced: list[tuple[str, str]], suffix: str
) -> None:
    building = ["--no-build"] if suffix == ".plan" else []
    result = rq_compile(model, "--plan", stages / "plan.json", "-o", out / f"model{suffix}", *building, "-q")
    assert result.exit_code == 0, result.stderr
    # The last one: a manifest may be written in a temporary folder first.
    renamed = {name: at for at, (event, name) in enumerate(traced) if event == "rename" and (out / name).exists()}
    assert sorted(renamed) == names(out)
    for at in renamed.values():
        assert traced[at - 1][0] == "sync"
        assert traced[at - 1][1] != out.name, "the file itself comes before"
        assert traced[at + 1] == ("sync", out.name)


# Temporary folders


def test_without_a_temporary_folder_the_output_s_is_taken(
    rq_compile: Run, model: Path, stages: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    for command in ("calibrate", "plan", "compile"):
        result = rq_compile(*writing(command, model, stages, out))
        assert result.exit_code == 0, result.stderr
        assert ("no usable temporary folder" in result.stderr) == (command == "calibrate")
        assert (f"working files go to {out}" in result.stderr) == (command == "calibrate")
        for file in out.iterdir():
            file.unlink()
    for output in ("edge", "edge.zip"):
        result = rq_compile("package", stages / "model.onnx", "--for", "edge", "-o", out / output)
        assert result.exit_code == 0, result.stderr
    assert names(out) == ["edge", "edge.zip"]
    with pytest.raises(UserError, match=r"no usable temporary folder .*; name one in TMPDIR"):
        spill.folder()


# Links


@pytest.fixture
def cached(stages: Path, out: Path) -> Path:
    """An engine as the Hugging Face hub stores downloads: every file is a link to a blob that is named by its hash."""
    (out / "blobs").mkdir()
    (out / "snapshots" / "1f").mkdir(parents=True)
    for number, file in enumerate(sorted(stages.glob("model.*"))):
        (out / "blobs" / f"{number:064x}").write_bytes(file.read_bytes())
        (out / "snapshots" / "1f" / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return out / "snapshots" / "1f" / "model.onnx"


def test_an_engine_of_links_runs(rq_compile: Run, stages: Path, cached: Path) -> None:
    before, linked = Engine.load(stages / "model.onnx"), Engine.load(cached)
    np.testing.assert_array_equal(linked.logits(IDS), before.logits(IDS))
    for layer, rows in before.loads(IDS).items():
        np.testing.assert_array_equal(linked.loads(IDS)[layer], rows)
    for arguments in (
        ("inspect", cached, "--verify"),
        ("generate", cached, "--prompt", "once", "--max-tokens", 2),
        ("package", cached, "--for", "edge", "-o", cached.parent / "edge"),
    ):
        assert rq_compile(*arguments).exit_code == 0
    assert not any(path.is_symlink() for path in (cached.parent / "edge").iterdir())


def test_a_package_of_links_runs(rq_compile: Run, stages: Path, out: Path) -> None:
    """Uploaded to the hub and used from its cache; or with a link only to its script."""
    assert rq_compile("package", stages / "model.onnx", "--for", "edge", "-o", out / "blobs", "-q").exit_code == 0
    (out / "snapshot").mkdir()
    for number, file in enumerate(sorted((out / "blobs").iterdir())):
        (out / "snapshot" / file.name).symlink_to(file.rename(out / "blobs" / f"{number:064x}"))
    (out / "alone.py").symlink_to(out / "folder" / "generate.py")
    assert rq_compile("package", stages / "model.onnx", "--for", "edge", "-o", out / "folder", "-q").exit_code == 0
    for script in (out / "snapshot" / "generate.py", out / "alone.py"):
        told, error = python(str(script), "--tokens", "2", "--ids", "5", "9").communicate()
        assert len(told.split()) == 2, error


def test_an_engine_whose_weights_alone_are_a_link_runs(stages: Path, out: Path, tmp_path: Path) -> None:
    for file in stages.glob("model.*"):
        (out / file.name).write_bytes(file.read_bytes())
    (tmp_path / "elsewhere").mkdir()
    weights = (out / "model.onnx.data").rename(tmp_path / "elsewhere" / "weights")
    (out / "model.onnx.data").symlink_to(weights)
    np.testing.assert_array_equal(Engine.load(out / "model.onnx").logits(IDS), Engine.load(stages / "model.onnx").logits(IDS))


def test_a_link_to_an_engine_names_the_engine(rq_compile: Run, stages: Path, out: Path) -> None:
    (out / "mine.onnx").symlink_to(stages / "model.onnx")
    refused(rq_compile("inspect", out / "mine.onnx"), 2, "has no manifest", f"because it is a link; name {stages / 'model.onnx'}")
    assert file_systems.readable("a\udcffb") == r"a\xffb"


def test_an_op_library_that_does_not_load(rq_compile: Run, stages: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a library that was built on a newer system: the message contains the loader's reason."""
    (out / "librq_moe.so").write_bytes(b"\x7fELF of another machine")
    monkeypatch.setattr("rq_compile.engine.library.library_path", lambda *_: out / "librq_moe.so")
    result = rq_compile("generate", stages / "model.onnx", "--prompt", "a")
    refused(result, 1, "cannot load", out / "librq_moe.so", "compile with --lowering stock")
