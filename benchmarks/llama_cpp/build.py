"""Fetches llama.cpp, from the sources of llama-cpp-python in the package index, and builds its ggml and our layer on it.

About 80 MB and a few minutes; needs pip, CMake and a C++ compiler. ``moe_layer.py`` then times it with the others.

    python benchmarks/llama_cpp/build.py
    python benchmarks/llama_cpp/build.py --server

With ``--server``, it builds llama.cpp's own HTTP server instead, for ``serving.py``: about 20 minutes on one core.
"""

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "llama_cpp"
RELEASE = "0.3.36"  # of llama-cpp-python, whose vendor/llama.cpp is built


def fetch(folder: Path) -> Path:
    """The sources of llama.cpp; the package's other files are left out."""
    name = f"llama_cpp_python-{RELEASE}"
    archive = folder / f"{name}.tar.gz"
    if not archive.is_file():
        package = f"llama-cpp-python=={RELEASE}"
        command = ["pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder), package]
        subprocess.run([sys.executable, "-m", *command], check=True)
    sources = f"{name}/vendor/llama.cpp"
    with tarfile.open(archive) as file:
        file.extractall(folder, [member for member in file if member.name.startswith(f"{sources}/")], filter="data")
    return folder / sources


def build(sources: Path, folder: Path, jobs: int) -> None:
    subprocess.run(["cmake", "-S", HERE, "-B", folder, f"-DLLAMA_CPP={sources.resolve()}"], check=True)
    subprocess.run(["cmake", "--build", folder, "--parallel", str(jobs)], check=True)


def build_server(sources: Path, folder: Path, jobs: int) -> None:
    options = ["BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI", "USE_PREBUILT_UI", "BUILD_APP", "OPENSSL"]
    settings = ["-DCMAKE_BUILD_TYPE=Release", *(f"-DLLAMA_{option}=OFF" for option in options)]
    subprocess.run(["cmake", "-S", sources, "-B", folder, *settings], check=True)
    subprocess.run(["cmake", "--build", folder, "--parallel", str(jobs), "--target", "llama-server"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder for all files, default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--server", action="store_true", help="build llama.cpp's HTTP server")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.server:
        build_server(fetch(args.folder), args.folder / "server", args.jobs)
        print(f"built {args.folder}/server/bin/llama-server; time it with python benchmarks/serving.py")
        return
    build(fetch(args.folder), args.folder / "build", args.jobs)
    print(f"built; time it with python benchmarks/moe_layer.py --llama-cpp {args.folder}")


if __name__ == "__main__":
    main()
