"""The graph of an engine in a form that ONNX Runtime can load, wherever the engine's files are."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rq_compile.engine.manifest import Manifest
from rq_compile.errors import UserError
from rq_compile.file_systems import readable

if TYPE_CHECKING:
    import onnx


def loadable_graph(engine: Path, manifest: Manifest, outputs: Iterable[str] = ()) -> tuple[str | bytes, Path]:
    """The path of the graph, or the graph itself if it must be changed, and the folder to which the paths of its weights refer.

    ``outputs`` are int32 vectors of the graph that become outputs too. ONNX Runtime refuses weights that are links out of the
    folder, as in a cache of the Hugging Face hub. Such weights are named by the files that they link to.

    Raises:
        UserError: the graph cannot be read, or names weights that it cannot reach.
    """
    folder = engine.parent.resolve()
    of_ranks = [rank.weights for rank in manifest.ranks if rank.graph.name == engine.name]
    weights = [engine.parent / file.name for file in (manifest.weights, *of_ranks, *manifest.linked)]
    scattered = any(file.resolve().parent != folder for file in (engine, *weights))
    if not scattered and not outputs:
        # ONNX Runtime does not accept paths that are not UTF-8.
        return (str(engine) if readable(str(engine)) == str(engine) else engine.read_bytes()), folder

    import onnx

    model = onnx.load(engine, load_external_data=False)
    known = {output.name for output in model.graph.output}
    for name in outputs:
        if name not in known:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, [None]))
    if scattered:
        folder = Path(folder.anchor)
        _relocate(model, {file.name: file.resolve() for file in weights}, folder)
    return model.SerializeToString(), folder


def _relocate(model: "onnx.ModelProto", files: dict[str, Path], folder: Path) -> None:
    from rq_compile.rewrite.weights import external_tensors

    for tensor in external_tensors(model.graph):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value in files:  # our engines name no other files
                place = os.path.relpath(files[entry.value], folder)
                if readable(place) != place:
                    raise UserError(f"{entry.value} is a link to {readable(place)}, which is not UTF-8; copy the file here", 2)
                entry.value = place
