"""The CPUs, threads and bytes that control groups and affinity leave to a process, with directory trees as on Linux."""

import os
from pathlib import Path

import pytest
from command_line import python

from rq_compile.standalone import limits

pytestmark = pytest.mark.quick

VERSION_2 = "30 23 0:26 / {root} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
VERSION_1 = "33 30 0:30 {inside} {root}/{name} rw,nosuid - cgroup cgroup rw,{name}\n"


class Machine:
    """A made-up /proc/self and /sys/fs/cgroup."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups, self.process = folder / "cgroup", folder / "proc"
        self.process.mkdir()
        monkeypatch.setattr(limits, "PROCESS", self.process)
        monkeypatch.setattr(limits, "CPUS", folder / "no topology")

    def of(self, mounts: str, memberships: str) -> None:
        (self.process / "mountinfo").write_text("21 1 0:5 / /proc rw - proc proc rw\n" + mounts)
        (self.process / "cgroup").write_text(memberships)

    def group(self, place: str, **files: str) -> None:
        folder = self.groups / place
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", 16), ("400000 100000", 4), ("150000 100000", 2), ("20000 100000", 1), ("9900000 100000", 16), ("", 16)],
)
def test_a_quota_of_version_2(machine: Machine, quota: str, cpus: int) -> None:
    machine.of(VERSION_2.format(root=machine.groups), "0::/pod/box\n")
    machine.group("pod/box", cpu__max=quota)
    assert limits.usable_cpus() == limits.default_threads() == cpus


def test_the_smallest_quota_of_all_groups_counts(machine: Machine) -> None:
    machine.of(VERSION_2.format(root=machine.groups), "0::/pod/box\n")
    machine.group("pod", cpu__max="250000 100000")
    machine.group("pod/box", cpu__max="800000 100000")
    assert limits.cpu_quota() == 2.5
    assert limits.usable_cpus() == 3


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 16), ("50000", 1), ("600000", 6)])
def test_a_quota_of_version_1(machine: Machine, quota: str, cpus: int) -> None:
    machine.of(VERSION_1.format(inside="/", root=machine.groups, name="cpu,cpuacct"), "3:cpu,cpuacct:/pod\n0::/\n")
    machine.group("cpu,cpuacct/pod", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert limits.usable_cpus() == cpus


def test_a_container_whose_group_is_its_root(machine: Machine) -> None:
    """The process knows the group's path outside of the container; inside, the mount begins with it."""
    machine.of(VERSION_1.format(inside="/docker/1f", root=machine.groups, name="cpu"), "4:cpu:/docker/1f\n")
    machine.group("cpu", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert limits.usable_cpus() == 3
    machine.of(VERSION_1.format(inside="/", root=machine.groups, name="cpu"), "4:cpu:/docker/1f\n")
    assert limits.usable_cpus() == 3, "the path outside does not exist inside"
    machine.of(VERSION_1.format(inside="/", root=machine.groups, name="cpu"), "4:cpu:/../../other\n")
    assert limits.usable_cpus() == 3


def test_memory_of_both_versions(machine: Machine) -> None:
    """As set up by a scheduler: the job is limited, but the step in it is not."""
    machine.of(VERSION_2.format(root=machine.groups), "0::/job/step/task\n")
    for place, limit, used in (("job", "5000", 1200), ("job/step", "max", 1200), ("job/step/task", "9000", 1000)):
        machine.group(
            place, memory__max=limit, memory__current=str(used), memory__stat="anon 1\ninactive_file 100\nactive_file 50"
        )
    assert limits.memory_left() == [8150, 3950]
    machine.of(VERSION_1.format(inside="/", root=machine.groups, name="memory"), "4:memory:/pod\n3:cpu:/other\n0::/job\n")
    told = {"memory__stat": "inactive_file 7\ntotal_inactive_file 100\ntotal_active_file 50", "memory__usage_in_bytes": "1000"}
    machine.group("memory/pod", memory__limit_in_bytes="9000", **told)
    assert limits.memory_left() == [8150]


def test_a_mount_point_with_a_space(machine: Machine) -> None:
    machine.groups = machine.groups.with_name("c group")
    machine.of(VERSION_2.format(root=str(machine.groups).replace(" ", r"\040")), "0::/\n")
    machine.group("", cpu__max="200000 100000")
    assert limits.usable_cpus() == 2


def test_no_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROCESS", tmp_path / "nothing")
    assert limits.cpu_quota() is None
    assert limits.memory_left() == []
    assert limits.usable_cpus() >= 1


def test_threads_are_physical_cores_of_the_affinity(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CPUS", tmp_path / "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5})
    for cpu in range(8):  # 0 and 4 share a core, 1 and 5, ...
        (tmp_path / "cpu" / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    machine.of("", "")
    assert (limits.usable_cpus(), limits.default_threads()) == (4, 2)


def test_onnx_runtime_chooses_only_where_all_cpus_are_free(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.of("", "")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert limits.session_threads() == 0
    assert limits.session_threads(3) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert limits.session_threads() == 16


ONE_CPU = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
torch.set_num_threads(8)
from pathlib import Path
from rq_compile.architectures.load import torch_threads
from rq_compile.runtime.engine import Engine
from rq_compile.evaluation.machine import describe_machine
engine = Engine.load(Path(%r))
with torch_threads():
    print(torch.get_num_threads(), engine._session.get_session_options().intra_op_num_threads, describe_machine(), sep="|")
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2 or not hasattr(os, "sched_setaffinity"), reason="needs two CPUs")
def test_a_process_on_one_cpu_runs_on_one_thread(stages: Path) -> None:
    told, error = python("-c", ONE_CPU % str(stages / "model.onnx")).communicate()
    torch_threads, session_threads, machine = told.strip().split("|")
    assert (torch_threads, session_threads) == ("1", "1"), error
    assert f"1 of {os.cpu_count()} CPUs" in machine
