"""Folders and files that are mistaken for a checkpoint: says what each is, and how to get a checkpoint from it."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rq_compile.checkpoint.folder import read_json
from rq_compile.errors import UserError

WHOLE = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Kind:
    """``files``: patterns. A folder with a matching file is of this kind, unless a file matches one of ``unless``.

    ``sentence(folder, file)``: says what ``folder`` is, from the ``file`` that was found, and the way out.
    """

    files: tuple[str, ...]
    sentence: Callable[[Path, Path], str]
    unless: tuple[str, ...] = ()


def refuse_other_folders(folder: Path) -> None:
    """
    Raises:
        UserError: ``folder`` is empty or is one of ``KINDS``.
    """
    if not any(folder.iterdir()):
        raise UserError(f"{folder} is an empty folder; give the folder of a Hugging Face checkpoint", 2)
    for kind in KINDS:
        file = next((found for pattern in kind.files for found in sorted(folder.glob(pattern))), None)
        if file is not None and not any(any(folder.glob(pattern)) for pattern in kind.unless):
            raise UserError(kind.sentence(folder, file), 2)


def refuse_weights_file(file: Path) -> None:
    """
    Raises:
        UserError: ``file`` holds weights of a checkpoint, or is a GGUF file.
    """
    if file.suffix == ".gguf":
        raise UserError(_gguf(file.parent, file), 2)
    if file.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise UserError(f"{file} holds weights without the config that they need; give the folder of the checkpoint", 2)


def _gguf(folder: Path, file: Path) -> str:
    code = (
        f"import transformers as t; at = {json.dumps(str(folder))}; name = {json.dumps(file.name)}; "
        't.AutoModelForCausalLM.from_pretrained(at, gguf_file=name, dtype="bfloat16").save_pretrained("converted"); '
        't.AutoTokenizer.from_pretrained(at, gguf_file=name).save_pretrained("converted")'
    )
    return (
        f"{folder} has its weights in {file.name}, a GGUF file, which is not supported; use the safetensors files that it was "
        f"made from, or convert it with python -c {shlex.quote(code)}"
    )


def _adapter(folder: Path, file: Path) -> str:
    config = read_json(file)
    base = config.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base.isprintable() and base else "its base model"
    code = (
        f"from peft import AutoPeftModelForCausalLM as P; P.from_pretrained({json.dumps(str(folder))}, dtype='auto')"
        ".merge_and_unload().save_pretrained('merged')"
    )
    return (
        f"{folder} is an adapter ({file.name}) of {base}, not a whole model; merge the two with python -c {shlex.quote(code)}, "
        "copy the base model's tokenizer.json there, and give that folder"
    )


def _pipeline(folder: Path, file: Path) -> str:
    kind = read_json(file).get("_class_name")
    named = f" ({kind})" if isinstance(kind, str) and kind.isprintable() else ""
    return f"{folder} is a diffusers pipeline{named}, not a language model; give a sparse MoE language model's checkpoint"


def _publishers_own(folder: Path, file: Path) -> str:
    return (
        f"{folder} has weights in the layout of their publisher's own code ({file.name}), which is not supported; use the files "
        "for transformers in the same repository (config.json and model*.safetensors)"
    )


def _tensorrt_llm(folder: Path, file: Path) -> str:
    return (
        f"{folder} is a checkpoint of TensorRT-LLM ({file.name}), which splits and fuses the weights; give the Hugging Face "
        "checkpoint that it was made from"
    )


def _onnx(folder: Path, file: Path) -> str:
    return (
        f"{folder} is an exported model ({file.name}); give the checkpoint that it was exported from, or "
        "inspect the .onnx file itself if rq-compile wrote it"
    )


def _other_framework(folder: Path, file: Path) -> str:
    return (
        f"{folder} has its weights in {file.name}, of TensorFlow or JAX, which is not supported; use the model's safetensors "
        "files, which are in the same repository or in a later revision of it"
    )


def _tokenizer_only(folder: Path, file: Path) -> str:
    return f"{folder} holds a tokenizer ({file.name}) but no model; give the folder that also has config.json and the weights"


# The first kind that matches applies.
KINDS = (
    Kind(("model_index.json",), _pipeline, unless=("config.json",)),
    Kind(("adapter_config.json",), _adapter, unless=WHOLE),
    Kind(("*.gguf",), _gguf, unless=("*.safetensors",)),
    Kind(("rank0.safetensors",), _tensorrt_llm),
    Kind(("params.json", "consolidated*.safetensors", "consolidated*.pth"), _publishers_own, unless=WHOLE),
    Kind(("*.onnx", "onnx/*.onnx"), _onnx, unless=("*.safetensors", "*.bin")),
    Kind(("tf_model*.h5", "flax_model*.msgpack", "*.ckpt.index"), _other_framework, unless=("*.safetensors", "*.bin")),
    Kind(TOKENIZER, _tokenizer_only, unless=("config.json", "*/config.json", "*.safetensors")),
)
