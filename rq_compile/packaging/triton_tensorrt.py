"""Triton's TensorRT backend: tensors in, tensors out, by engines of one model that were each built for a compute capability.

What the backend makes of a config: triton-inference-server/tensorrt_backend, and ``cc_model_filenames`` of model_config.proto.
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
# By the backend's source (loader.cc), what lets an engine bring code of its own, be it a runtime or plugins.
CODE_ALLOWED = "--backend-config=tensorrt,version-compatible=true"


def read_engine(source: Path) -> TensorRTManifest:
    """The manifest beside ``source`` (``.plan``).

    Raises:
        UserError: the engine or its manifest is missing, it is damaged, or it is one of TensorRT-RTX.
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
            f"{source} was built by TensorRT-RTX, and Triton's backend runs TensorRT's; compile with --builder tensorrt", 2
        )
    known = manifest.files.get("engine")
    if known is not None and sha256(source) != known.sha256:
        raise UserError(f"{source} is damaged: it is not the one that its manifest describes; copy it again", 2)
    return manifest


def write(source: Path, manifest: TensorRTManifest, model: Path, engine_for: tuple[str, ...] = ()) -> tuple[Any, list[str]]:
    """Put the engines into ``model``'s version folder; returns its ``ModelConfig`` and remarks.

    ``engine_for``: ``8.9=FILE``, for several GPUs; ``source`` is one of them. Without it every GPU is given ``source``.

    Raises:
        UserError: an entry is not of that form, an engine is refused by ``read_engine`` or is not the same model's.
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
            raise UserError(f"{path} has another plan, other tensors or profiles than {source}; compile both from the same", 2)
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
            f"the engine carries the code of its MoE layers; the backend runs it only in a server started with {CODE_ALLOWED}"
        )
    if most > 1:
        remarks.append("requests share a batch only while their shapes are equal: as many new and as many cached tokens")
    return config(model.name, names, inputs, outputs, most, len(manifest.profiles)), remarks


def engines_by_capability(source: Path, engine_for: Iterable[str]) -> dict[str, Path]:
    """Compute capability (``8.9``) -> engine.

    Raises:
        UserError: an entry is not CAPABILITY=FILE, names a capability twice, or none names ``source``.
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
    """Without the batch, their first dimension."""
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

    The one instance group has all ``profiles``, among which the backend chooses by the shapes of a request: Triton gives a
    request to whichever instance is free, so that one with the decoding profile alone would be given prompts.
    """
    config = model_config(name, "tensorrt", inputs, outputs, {})
    # No default beside these: a GPU without an engine must be refused by name, not given one that it cannot run.
    config.cc_model_filenames.update(engines)
    if not engines:
        config.default_model_filename = "model.plan"
    config.max_batch_size = max_batch_size
    if max_batch_size > 1:
        config.dynamic_batching.SetInParent()
    config.instance_group.add(kind=messages().ModelInstanceGroup.KIND_GPU, count=1, profile=map(str, range(profiles)))
    return config
