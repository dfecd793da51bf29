"""Installs a Python for 64-bit ARM with ONNX Runtime, to run in qemu on this machine: ``python install_aarch64.py FOLDER``.

The interpreter and the libraries it needs come from Debian's packages for arm64, which are unpacked to FOLDER/root and not
installed. Python packages come from wheels. FOLDER/bin/python runs it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

DEBIAN = (
    *("libc6", "libgcc-s1", "libstdc++6", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib"),
    *("zlib1g", "libexpat1", "libffi8", "libbz2-1.0", "liblzma5", "libuuid1"),
)
# The oldest ONNX Runtime that runs every engine. Newer ones (1.32) crash in qemu 7.2 when they are loaded.
PYTHON = ("onnxruntime==1.23.2", "onnx", "numpy", "ml_dtypes", "pydantic", "tokenizers", "pytest")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
LAUNCHER = """#!/bin/sh
folder=$(cd "$(dirname "$0")/.." && pwd)
QEMU_LD_PREFIX="$folder/root" PYTHONPATH="$PYTHONPATH:$folder/site" exec qemu-aarch64 "$folder/root/usr/bin/python3.11" "$@"
"""


def main(folder: Path) -> None:
    for tool in ("apt-get", "dpkg", "qemu-aarch64"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not installed; this needs Debian 12 and its package qemu-user")
    downloads = folder / "downloads"
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("lists/partial", "cache/archives/partial", "packages"):
        (downloads / part).mkdir(parents=True)
    apt = ["apt-get", "-qq", "-o", "APT::Architectures::=arm64", "-o", f"Dir::State::lists={downloads.resolve()}/lists"]
    apt += ["-o", f"Dir::Cache={downloads.resolve()}/cache"]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *(f"{name}:arm64" for name in DEBIAN)], check=True, cwd=downloads / "packages")
    for package in sorted((downloads / "packages").glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)
    wheels = [option for platform in PLATFORMS for option in ("--platform", platform)]
    pip = [sys.executable, "-P", "-m", "pip", "install", "--quiet", "--target", str(folder / "site"), "--python-version", "3.11"]
    subprocess.run([*pip, "--only-binary=:all:", *wheels, *PYTHON], check=True)
    shutil.rmtree(downloads)
    launcher = folder / "bin" / "python"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
