"""How many CPUs and how much memory this process may use, by its CPU affinity and its Linux control groups.

Both versions of control groups are read.
"""

import math
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# What describes the process, its CPUs and the machine's memory; tests replace them.
MACHINE = Path("/proc/meminfo")
PROCESS = Path("/proc/self")
CPUS = Path("/sys/devices/system/cpu")


def usable_cpus() -> int:
    """Number of CPUs that this process may use: those of its affinity, but at most its CPU quota, rounded up."""
    return _within_quota(len(affinity()))


def default_threads() -> int:
    """Number of compute threads: one per physical core among the usable CPUs, as ONNX Runtime and torch choose."""
    cores = {_siblings(cpu) for cpu in affinity()}
    return _within_quota(len(cores))


def restricted() -> bool:
    """Whether this process may use fewer CPUs than the machine has."""
    return usable_cpus() < (os.cpu_count() or 1)


def session_threads(threads: int | None = None) -> int:
    """The number of threads for ONNX Runtime; 0 means its own choice.

    Its own choice is one thread for each physical core of the machine, pinned to it, whatever this process may use.
    """
    return threads or (default_threads() if restricted() else 0)


def affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpu_quota() -> float | None:
    """CPU seconds per second that the control groups allow; None if there is no limit."""
    quotas = []
    for version, group in control_groups("cpu"):
        with suppress(OSError, ValueError):  # a group without the file has no limit
            if version == 2:
                quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
            else:
                quota, period = (
                    (group / f"cpu.cfs_{part}_us").read_text(encoding="utf-8").strip() for part in ("quota", "period")
                )
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_left() -> list[int]:
    """Bytes left to this process by each control group that limits its memory."""
    left = []
    for version, group in control_groups("memory"):
        limit, used, prefix = ("memory.max", "memory.current", "")
        if version == 1:
            limit, used, prefix = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        with suppress(OSError, ValueError):
            bound = int((group / limit).read_text(encoding="utf-8"))
            # Cached files count as used memory, but can be evicted.
            cached = re.findall(
                rf"^{prefix}(?:in)?active_file (\d+)$", (group / "memory.stat").read_text(encoding="utf-8"), re.MULTILINE
            )
            left.append(bound - int((group / used).read_text(encoding="utf-8")) + sum(map(int, cached)))
    return left


def free_memory() -> int:
    """Bytes that this process can still allocate without swapping, according to the machine, its control groups and the process's
    own limit."""
    if not MACHINE.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    found = re.search(r"MemAvailable: *(\d+) kB", MACHINE.read_text(encoding="utf-8"))
    free = [int(found[1]) * 1024] if found else []
    free += memory_left()
    import resource  # not on every system

    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    if own != resource.RLIM_INFINITY:
        free.append(own - int((PROCESS / "statm").read_text(encoding="utf-8").split()[0]) * mmap.PAGESIZE)
    return max(0, min(free))


def control_groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of the control group of this process, and of each group that it is in, for ``controller``."""
    try:
        mounts = (PROCESS / "mountinfo").read_text(encoding="utf-8").splitlines()
        memberships = [line.split(":", 2) for line in (PROCESS / "cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return  # not Linux
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        root, place = (_unescaped(field) for field in before.split()[3:5])
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2":
            version, member = 2, [path for _, controllers, path in memberships if not controllers]
        elif kind == "cgroup" and controller in options.split(","):
            version, member = 1, [path for _, controllers, path in memberships if controller in controllers.split(",")]
        else:
            continue
        # A container may see its own group as the root, or under the path that the group has outside.
        inside = Path(member[0]) if member else root
        group = place / inside.relative_to(root) if inside.is_relative_to(root) else place
        for folder in (group, *group.parents):
            yield version, folder
            if folder == place:
                break


def _unescaped(field: str) -> Path:
    """A path of mountinfo, in which a space is written as ``\\040``."""
    return Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field))


def _within_quota(cpus: int) -> int:
    quota = cpu_quota()
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def _siblings(cpu: int) -> str:
    """The CPUs that share a physical core with ``cpu``; only itself if the system does not say."""
    try:
        return (CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="utf-8").strip()
    except OSError:
        return str(cpu)
