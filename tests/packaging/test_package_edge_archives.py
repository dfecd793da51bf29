"""The folder for a device, also as an archive: the same bytes every time, and nothing of the machine that wrote it."""

import json
import os
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from command_line import names
from edge_packages import Command, contents

from rq_compile.packaging.archive import write_files


def test_two_runs_give_the_same_bytes(rq_compile: Command, engine: Path, packaged: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere"
    assert rq_compile("package", engine, "--for", "edge", "-o", again, "-q").exit_code == 0
    assert contents(again) == contents(packaged)


def unpacked(archive: Path, folder: Path) -> Path:
    shutil.unpack_archive(archive, folder)
    (root,) = folder.iterdir()
    return root


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".zip"])
def test_an_archive_holds_the_folder_and_is_the_same_every_time(
    rq_compile: Command, engine: Path, packaged: Path, tmp_path: Path, ending: str
) -> None:
    archives = [tmp_path / f"bundle{ending}", tmp_path / f"again{ending}"]
    for time, archive in enumerate(archives):
        os.utime(engine, (time * 10**6, time * 10**6))
        result = rq_compile("package", engine, "--for", "edge", "-o", archive, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["files"] == names(packaged)
    assert archives[0].read_bytes() == archives[1].read_bytes()
    root = unpacked(archives[0], tmp_path / "unpacked")
    assert root.name == "small"
    assert contents(root) == contents(packaged)
    assert names(tmp_path) == sorted([*(archive.name for archive in archives), "edge", "unpacked"])


def test_archive_entries_say_nothing_of_the_machine(rq_compile: Command, engine: Path, packaged: Path, tmp_path: Path) -> None:
    for ending in (".tar.gz", ".zip"):
        assert rq_compile("package", engine, "--for", "edge", "-o", tmp_path / f"bundle{ending}", "-q").exit_code == 0
    expected = [f"small/{name}" for name in names(packaged)]
    with tarfile.open(tmp_path / "bundle.tar.gz") as archive:
        entries = archive.getmembers()
    assert [entry.name for entry in entries] == expected
    assert {(e.mode, e.mtime, e.uid, e.gid, e.uname, e.gname) for e in entries} == {(0o644, 0, 0, 0, "", "")}
    assert int.from_bytes((tmp_path / "bundle.tar.gz").read_bytes()[4:8], "little") == 0  # gzip's own time
    with zipfile.ZipFile(tmp_path / "bundle.zip") as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == expected
    assert {(info.date_time, info.external_attr >> 16) for info in infos} == {((1980, 1, 1, 0, 0, 0), 0o644)}


@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
def test_an_archive_is_streamed(tmp_path: Path, ending: str) -> None:
    weights, size = tmp_path / "weights", 64 << 20
    with weights.open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    write_files({"weights": weights}, tmp_path / f"bundle{ending}", root="model")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 8
    assert (unpacked(tmp_path / f"bundle{ending}", tmp_path / "unpacked") / "weights").stat().st_size == size
