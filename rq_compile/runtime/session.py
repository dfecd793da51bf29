"""Open the graph of an engine in ONNX Runtime, with its op libraries, and check that it is the one of the manifest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rq_compile.engine import library
from rq_compile.engine.library import CPU_LIBRARY, MPI_LIBRARY
from rq_compile.engine.manifest import Manifest
from rq_compile.engine.ranks import IDLE
from rq_compile.errors import UserError, reason
from rq_compile.lowerings import LOWERINGS
from rq_compile.runtime.graph import loadable_graph
from rq_compile.standalone.limits import session_threads

if TYPE_CHECKING:
    import onnxruntime

# The inputs of a graph besides its cache.
FED = {"input_ids", "attention_mask", "position_ids", "logits_to_keep", "decoder_input_ids", IDLE}
# The variable by which a user chooses the op library's instruction set.
INSTRUCTION_SETS = "RQ_MOE_ISA"
# The folder of the weights of a graph that is given as bytes.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def session_of(
    engine: Path, graph: Path, manifest: Manifest, threads: int | None, outputs: Sequence[str] = ()
) -> onnxruntime.InferenceSession:
    """A session of ``graph``, that of ``engine`` or of one of its ranks, with ``outputs`` in addition to its own.

    ``threads``: see ``session_threads``.

    Raises:
        UserError: ONNX Runtime does not have the engine's execution provider, or refuses the graph or an op library, or the
            graph is not the one that the manifest describes.
    """
    import onnxruntime

    provider = manifest.provider
    if provider not in onnxruntime.get_available_providers():
        raise UserError(
            f"{engine} needs {provider}, which ONNX Runtime {onnxruntime.__version__} does not have here; "
            "install onnxruntime-gpu on a machine with a GPU, or compile with --lowering native",
            2,
        )
    model, folder = loadable_graph(graph, manifest, outputs)
    options = _options(manifest, folder, threads)
    # ONNX Runtime runs ops without a GPU kernel on the CPU.
    providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        version, said = onnxruntime.__version__, reason(error)
        if (asked := said.find(INSTRUCTION_SETS)) >= 0:  # says the way out itself
            raise UserError(said[asked:], 2) from error
        raise UserError(
            f"ONNX Runtime {version} cannot load {engine}: {said}; "
            f"compile it again with {manifest.tool}, or install a newer onnxruntime"
        ) from error
    if (unlike := _unlike(manifest, session)) is not None:
        raise UserError(f"{engine} and its manifest differ in {unlike}; copy both again or compile again", 2)
    return session


def _options(manifest: Manifest, folder: Path, threads: int | None) -> onnxruntime.SessionOptions:
    """Those of a session with the engine's op libraries, whose weights are in ``folder``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Otherwise ONNX Runtime keeps a plan of the memory for every combination of shapes that it has seen.
    options.enable_mem_pattern = False
    # As bytes, because the folder's name need not be UTF-8.
    options.add_session_config_entry(WEIGHTS_FOLDER, os.fsencode(folder))
    for name, value in LOWERINGS[manifest.lowering].session_options.items():
        options.add_session_config_entry(name, value)
    options.intra_op_num_threads = session_threads(threads)
    if manifest.op_library is None:
        return options
    names = [manifest.op_library_name or CPU_LIBRARY, *([MPI_LIBRARY] if manifest.ranks else [])]
    for path in map(library.library_path, names):
        try:
            options.register_custom_ops_library(os.fsencode(path))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise UserError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {reason(error)}; "
                "build it on this system with pip install --force-reinstall rq-compile, or compile with --lowering stock"
            ) from error
    return options


def _unlike(manifest: Manifest, session: onnxruntime.InferenceSession) -> str | None:
    """An input that would get no value, or a tensor of the cache that is not an output or has another shape; None if there is
    none."""
    shapes = {tensor.name: tensor.shape for tensor in session.get_inputs()}
    unfed = shapes.keys() - FED - {tensor.past for tensor in manifest.cache}
    lacking = {tensor.present for tensor in manifest.cache} - {output.name for output in session.get_outputs()}
    misshapen = {tensor.past for tensor in manifest.cache if not _fits(tensor.shape, shapes.get(tensor.past, tensor.shape))}
    return min(unfed | lacking | misshapen, default=None)


def _fits(shape: Sequence[int | str], of_graph: Sequence[int | str | None]) -> bool:
    """Whether ``shape`` has the rank and the fixed sizes of the graph's."""
    if len(shape) != len(of_graph):
        return False
    return all(size == fixed for size, fixed in zip(shape, of_graph, strict=True) if isinstance(fixed, int))
