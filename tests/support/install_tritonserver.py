"""Makes the ``tritonserver`` of an installed nvidia-pytriton start on its own. Run this with the Python of that environment.

The wheel has the server, its python backend, and, in a different folder, the backend's stub for each Python. The stub needs the
shared library of its Python, and finds the environment through the first ``python3`` of the path.
"""

import shutil
import sys
import sysconfig
from pathlib import Path

LAUNCHER = """#!/bin/sh
PATH={programs}:$PATH exec {server}/bin/tritonserver --backend-directory={server}/backends "$@"
"""


def main() -> None:
    packages, programs = Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("scripts"))
    server = packages / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / sysconfig.get_python_version() / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(sorted(path.name for path in (server / "python_backend_stubs").iterdir()))
        sys.exit(f"nvidia-pytriton has no stub for Python {sysconfig.get_python_version()}, only for {known}; use one of these")
    shutil.copy(stub, server / "backends" / "python")
    library = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
    if library.suffix != ".a":  # otherwise the system's is used
        shutil.copy(library, packages / "nvidia_pytriton.libs")
    launcher = programs / "tritonserver"
    launcher.write_text(LAUNCHER.format(programs=programs, server=server))
    launcher.chmod(0o755)


if __name__ == "__main__":
    main()
