"""How a command's process ends."""

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End the process as Python does, but without taking its modules apart one by one: with torch and transformers, that takes
    more than a second. Where other threads are still to be waited for, or the output is gone, Python ends it as usual."""
    if "torch" in sys.modules and not _others():
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        except (OSError, ValueError):
            sys.exit(status)
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


def _others() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
