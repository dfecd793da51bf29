"""The files of an engine: one ``.onnx`` with other files beside it, or a folder with a graph for each rank."""

from pathlib import Path

# In the folder of an engine of several processes, the files have the names of an engine ``engine.onnx``, which has no graph of
# its own.
IN_FOLDER = "engine.onnx"


def stem_of(engine: Path) -> Path:
    """The ``.onnx`` path from which the names of all files of ``engine`` are made."""
    return engine if engine.suffix == ".onnx" else engine / IN_FOLDER


def manifest_path(engine: Path) -> Path:
    return stem_of(engine).with_suffix(".json")


def engine_of(file: Path) -> Path:
    """The engine that ``file`` is: the engine itself, or the manifest of one."""
    if file.is_dir():
        return file
    graph = file.with_suffix(".onnx")
    return file.parent if graph.name == IN_FOLDER and not graph.exists() else graph


def graph_of_rank(engine: Path, rank: int) -> Path:
    return stem_of(engine).with_suffix(f".rank{rank}.onnx")


def weights_of(graph: Path) -> Path:
    """The weights file that belongs to a graph, or to the stem of an engine of several processes."""
    return Path(f"{graph}.data")
