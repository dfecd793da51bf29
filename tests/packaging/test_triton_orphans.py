"""A process of Triton's python backend ends after its server was killed, in whatever state that left its threads."""

import os
import signal
import subprocess
import sys
from select import select

import pytest

from rq_compile.packaging.triton_python import MODEL

# The watch of a packaged model.py, in a process whose parent stands for the server. A line says that it begins.
PROGRAM = """
import ctypes, importlib.util, os, sys, time
from threading import Event, Thread
from types import ModuleType, SimpleNamespace

is_model_ready, main, file = sys.argv[1:]
backend = ModuleType("backend")
backend.is_model_ready = lambda name, version: eval(is_model_ready)
sys.modules["triton_python_backend_utils"] = backend
spec = importlib.util.spec_from_file_location("rq_compile.standalone.model", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.WATCH, module.SILENCE = 0.05, 1.0
if os.fork() == 0:
    model = SimpleNamespace(ended=Event(), scheduler=SimpleNamespace(busy=True, close=lambda: None))
    print("begins", flush=True)
    Thread(target=module.TritonPythonModel.watch, args=(model, "model", "1"), daemon=True).start()
    time.sleep(0.2)
    eval(main)
else:
    time.sleep(60)
"""
WAITS = "time.sleep(60)"
KEEPS_THE_LOCK = "ctypes.PyDLL(None).sleep(60)"  # Python's lock


@pytest.mark.parametrize(
    ("is_model_ready", "main", "blocked"),
    [
        ("True", WAITS, False),
        ("1 / 0", WAITS, False),
        (WAITS, WAITS, True),
        (KEEPS_THE_LOCK, WAITS, True),
        ("True", KEEPS_THE_LOCK, True),
    ],
    ids=["free", "no answer", "watch waits", "watch keeps the lock", "main keeps the lock"],
)
def test_a_process_ends_without_its_server(is_model_ready: str, main: str, blocked: bool) -> None:
    words = [sys.executable, "-P", "-c", PROGRAM, is_model_ready, main, str(MODEL)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert server.stdout
        assert server.stdout.readline() == "begins\n"
        # Unless it is blocked for longer than SILENCE, it does not end while its server lives.
        assert select([server.stdout], [], [], 0.5 if blocked else 2.0)[0] == []
        server.kill()
        # The output ends with the last process that holds it.
        assert server.communicate(timeout=20)[0] == ""
    finally:
        os.killpg(server.pid, signal.SIGKILL)
