"""Triton's TensorRT backend: tensors in, tensors out, with engines of one model, each built for one compute capability.

triton-inference-server/tensorrt_backend, and ``cc_model_filenames`` of model_config.proto, show how the backend reads a config.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - makes "bfloat16" a name of numpy's
import numpy as np

from rq_compile.errors import UserError
from rq_compile.files import read_document, sha256
from rq_compile.packaging.triton_config import Tensor, messages, model_config
from rq_compile.targets.tensorrt.manifest import Binding, TensorRTManifest

BATCH = "batch"
# According to the backend's source (loader.cc), this lets an engine bring its own code, such as a runtime or plugins.
CODE_ALLOWED = "--backend-config=tensorrt,version-compatible=true"


def read_engine(source: Path) -> TensorRTManifest:
    """The manifest beside ``source`` (``.plan``).

    Raises:
        UserError: the engine or its manifest is missing, or the engine is damaged or was built by TensorRT-RTX.
    """
    document = source.with_suffix(".json")
    for path, what in ((source, "engine"), (document, "manifest")):
        if not path.is_file():
            raise UserError(
                f"no {what} {path}; compile it with rq-compile MODEL -o {source.name}, or build it as its script says", 2
            )
    manifest = read_document(TensorRTManifest, document)
    if manifest.target == "tensorrt-rtx":
        raise UserError(
            f"{source} was built by TensorRT-RTX, but Triton's backend runs TensorRT engines; compile with --builder tensorrt",
            2,
        )
    known = manifest.files.get("engine")
    if known is not None and sha256(source) != known.sha256:
        raise UserError(f"{source} is damaged: it differs from its manifest; copy it again", 2)
    return manifest


def write(source: Path, manifest: TensorRTManifest, model: Path, engine_for: tuple[str, ...] = ()) -> tuple[Any, list[str]]:
    """Put the engines into ``model``'s version folder. Returns its ``ModelConfig`` and remarks.

    ``engine_for``: entries ``8.9=FILE`` for several GPUs; ``source`` is one of them. Without entries, every GPU gets ``source``.

    Raises:
        UserError: an entry is not of that form, or an engine is refused by ``read_engine`` or is for another model.
    """
    engines = engines_by_capability(source, engine_for)
    for path in engines.values():
        other = read_engine(path)
        if (other.inputs, other.outputs, other.profiles, other.plan) != (
            manifest.inputs,
            manifest.outputs,
            manifest.profiles,
            manifest.plan,
        ):
            raise UserError(f"{path} differs from {source} in its plan, tensors or profiles; compile both from the same plan", 2)
    names = {capability: f"{capability}.plan" for capability in engines}
    for capability, path in engines.items():
        shutil.copyfile(path, model / "1" / names[capability])
    if not engines:
        shutil.copyfile(source, model / "1" / "model.plan")
    most = min(profile.batch.most for profile in manifest.profiles)
    inputs, outputs = tensors(manifest.inputs), tensors(manifest.outputs)
    remarks = [
        "the client carries the KV cache from step to step",
        "an engine runs on the GPU model and the TensorRT version that built it; the server says so when it loads",
    ]
    if manifest.carries_code:
        remarks.append(
            f"the engine contains the code of its MoE layers; the backend runs it only in a server started with {CODE_ALLOWED}"
        )
    if most > 1:
        remarks.append("requests share a batch only while their shapes are equal: the same numbers of new and of cached tokens")
    return config(model.name, names, inputs, outputs, most, len(manifest.profiles)), remarks


def engines_by_capability(source: Path, engine_for: Iterable[str]) -> dict[str, Path]:
    """Compute capability (``8.9``) -> engine.

    Raises:
        UserError: an entry is not CAPABILITY=FILE, a capability is named twice, or no entry names ``source``.
    """
    engines: dict[str, Path] = {}
    for entry in engine_for:
        capability, _, file = entry.partition("=")
        if not re.fullmatch(r"\d+\.\d", capability) or not file:
            raise UserError(f"--engine-for {entry} is not CAPABILITY=FILE; write for example --engine-for 8.9={source.name}", 2)
        if capability in engines:
            raise UserError(f"--engine-for {capability} is given twice; leave one out", 2)
        engines[capability] = Path(file)
    if engines and source.resolve() not in {path.resolve() for path in engines.values()}:
        raise UserError(
            f"no --engine-for names {source}; add --engine-for CAPABILITY={source} for the GPU that it was built on", 2
        )
    return engines


def tensors(bindings: Iterable[Binding]) -> list[Tensor]:
    """The tensors without their first dimension, the batch."""
    return [
        Tensor(binding.name, np.dtype(binding.dtype), tuple(-1 if isinstance(d, str) else d for d in binding.shape[1:]))
        for binding in bindings
    ]


def config(
    name: str,
    engines: Mapping[str, str],
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    max_batch_size: int,
    profiles: int,
) -> Any:
    """A ``ModelConfig``; ``engines``: compute capability -> file in the version's folder, empty for one that serves any GPU.

    The one instance group has all ``profiles``, and the backend chooses a profile by the shapes of a request. Triton gives a
    request to any free instance, so an instance with only the decoding profile would also get prompts.
    """
    config = model_config(name, "tensorrt", inputs, outputs, {})
    # No default engine: a GPU without its own engine must be refused by name, not given an engine that it cannot run.
    config.cc_model_filenames.update(engines)
    if not engines:
        config.default_model_filename = "model.plan"
    config.max_batch_size = max_batch_size
    if max_batch_size > 1:
        config.dynamic_batching.SetInParent()
    config.instance_group.add(kind=messages().ModelInstanceGroup.KIND_GPU, count=1, profile=map(str, range(profiles)))
    return config
