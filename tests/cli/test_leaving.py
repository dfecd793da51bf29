"""The process of a command ends at once, but after all that Python does at its end, and with the command's status."""

import os
import sys

import pytest
from command_line import python

from rq_compile.cli.leaving import leave

PROGRAM = """
import atexit, sys, threading, time
from rq_compile.cli import leaving
{before}
atexit.register(lambda: print("at exit", flush=True))
class Apart:
    def __del__(self):
        print("taken apart", flush=True)
sys.modules["apart"] = Apart()
print("said", end=" ")
leaving.leave(3)
"""
THREAD = "threading.Thread(target=lambda: (time.sleep(0.3), print('thread', end=' '))).start()"
DAEMON = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("import torch", "said at exit\n"),
        (f"import torch; {DAEMON}", "said at exit\n"),
        (f"import torch; {THREAD}", "said thread at exit\ntaken apart\n"),
        ("", "said at exit\ntaken apart\n"),
    ],
    ids=["with torch", "with a daemon", "with a thread", "without torch"],
)
def test_what_is_done_at_the_end(before: str, said: str) -> None:
    process = python("-c", PROGRAM.format(before=before))
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error) == (3, said, "")


def test_where_the_output_is_gone_python_ends_and_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("it ended without a word"))
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(SystemExit) as ended:
        leave(3)
    assert ended.value.code == 3
