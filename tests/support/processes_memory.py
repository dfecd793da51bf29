"""The memory of a process and of all its descendants."""

import re
from pathlib import Path


def memory(process: int) -> int:
    """Proportional set size in bytes: pages that several processes share, mapped files among them, count once."""
    total = 0
    for member in family(process):
        try:
            found = re.search(r"^Pss: *(\d+) kB", Path(f"/proc/{member}/smaps_rollup").read_text(), re.MULTILINE)
        except OSError:  # it has just ended
            continue
        total += int(found[1]) * 1024 if found else 0
    return total


def family(process: int) -> list[int]:
    """The process and all its descendants."""
    members = [process]
    for member in members:
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members += map(int, children.read_text().split())
            except OSError:
                continue
    return members
