"""Folders and files that are no checkpoint, and checkpoints in formats that are not read: each is named, with the way out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from hostile import refused
from safetensors.torch import load_file, save_file
from torch import Tensor

Run = Callable[..., Result]
Files = dict[str, Any]
CONFIG = {"model_type": "olmoe"}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "some/moe"}
WEIGHTS = {"a.weight": torch.zeros(2, 2)}


def quantized(method: str) -> dict[str, object]:
    return {**CONFIG, "quantization_config": {"quant_method": method}}


def write(folder: Path, files: Files) -> Path:
    """``files``: bytes as they are, tensors as safetensors, anything else as JSON."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(content, file)
        else:
            file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["is an empty folder", "give the folder of a Hugging Face checkpoint"]),
        ({"model_index.json": {"_class_name": "FluxPipeline"}, "unet/config.json": {}}, ["diffusers pipeline (FluxPipeline)"]),
        ({"model_index.json": {}, "text_encoder/config.json": {"model_type": "clip"}}, ["a diffusers pipeline"]),
        ({"adapter_config.json": ADAPTER, "adapter_model.safetensors": WEIGHTS}, ["adapter", "some/moe", "merge_and_unload"]),
        ({"adapter_config.json": {}, "adapter_model.bin": b"PK", "config.json": CONFIG}, ["its base model", "merge_and_unload"]),
        ({"model-Q4_K_M.gguf": b"GGUF", "config.json": CONFIG}, ["a GGUF file", "gguf_file=name"]),
        ({"rank0.safetensors": WEIGHTS, "config.json": {"architecture": "X"}}, ["TensorRT-LLM", "that it was made from"]),
        ({"params.json": {}, "consolidated.safetensors": WEIGHTS}, ["publisher's own code (params.json)"]),
        ({"params.json": {}, "consolidated.00.pth": b"PK", "tokenizer.model": b"x"}, ["publisher's own code"]),
        ({"model.onnx": b"x", "config.json": CONFIG}, ["an exported model (model.onnx)"]),
        ({"onnx/model.onnx": b"x", "config.json": CONFIG, "tokenizer.json": {}}, ["an exported model (model.onnx)"]),
        ({"tf_model.h5": b"x", "config.json": CONFIG}, ["tf_model.h5, of TensorFlow or JAX"]),
        ({"flax_model.msgpack": b"x", "config.json": CONFIG}, ["flax_model.msgpack, of TensorFlow or JAX"]),
        ({"tokenizer.json": {}, "tokenizer_config.json": {}}, ["holds a tokenizer (tokenizer.json) but no model"]),
        ({"vocab.json": {}, "README.md": b"x"}, ["holds a tokenizer (vocab.json) but no model"]),
        ({"config.json": CONFIG}, ["has no .safetensors files"]),
        ({"config.json": CONFIG, "model.pth": b"PK"}, ["in *.pth files, which are pickled and never opened here"]),
        (
            {"config.json": quantized("torchao"), "pytorch_model.bin": b"PK"},
            ["pytorch_model*.bin files, stored by torchao, a format that is not read; use the 16-bit checkpoint"],
        ),
        (
            {"config.json": quantized("bitsandbytes"), "pytorch_model-00001-of-00002.bin": b"PK"},
            ["stored by bitsandbytes, a format that is not read; load it with transformers, call model.dequantize()"],
        ),
        ({"config.json": quantized("hqq"), "qmodel.pt": b"PK"}, ["in *.pt files, stored by HQQ, a format that is not read"]),
        ({"config.json": quantized("gptq"), "gptq_model.bin": b"PK"}, ["in *.bin files, which are pickled", "convert them with"]),
        ({"README.md": b"x"}, ["config.json is missing"]),
    ],
)
def test_a_folder_of_another_kind(tmp_path: Path, files: Files, words: list[str]) -> None:
    message = refused(write(tmp_path, files))
    assert str(tmp_path) in message
    for word in words:
        assert word in message


def test_an_adapter_beside_a_whole_model_is_left_out(own_model: Path, rq_compile: Run) -> None:
    write(own_model, {"adapter_config.json": ADAPTER, "adapter_model.safetensors": WEIGHTS})
    assert json.loads(rq_compile("inspect", own_model, "--json").stdout)["compiles"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.gguf", "gguf_file=name"), ("a.safetensors", "give the folder"), ("pytorch_model.bin", "give the folder")],
)
def test_a_file_of_weights(tmp_path: Path, rq_compile: Run, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    result = rq_compile("inspect", tmp_path / name)
    assert result.exit_code == 2
    assert words in result.stderr


def codes(*names: str, dtype: torch.dtype = torch.int16) -> Callable[[Tensor], dict[str, Tensor]]:
    """A weight as matrices of whole numbers with these names below the module's."""
    return lambda weight: {name: torch.zeros(len(weight), 4, dtype=dtype) for name in names}


FOREIGN: dict[str, tuple[dict[str, Any], Callable[[Tensor], dict[str, Tensor]]]] = {
    "EXL3": ({"quant_method": "exl3"}, codes(".trellis", ".suh")),
    "EXL2": ({"quant_method": "exl2"}, codes(".q_weight", ".q_scale", dtype=torch.int32)),
    "HQQ": ({"quant_method": "hqq"}, codes(".W_q", dtype=torch.uint8)),
    "quanto": ({"quant_method": "quanto"}, codes(".weight._data", dtype=torch.int8)),
    "AQLM": ({"quant_method": "aqlm"}, codes(".codes", ".codebooks")),
    "QuIP#": ({"quant_method": "quip"}, codes(".Qidxs")),
    "VPTQ": ({"quant_method": "vptq"}, codes(".indices", ".centroids.weight", ".centroids")),
    "torchao": ({"quant_method": "torchao"}, codes(".weight_qdata", ".weight_scale", dtype=torch.int8)),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        lambda weight: {".weight": weight.to(torch.int8), ".SCB": torch.ones(len(weight))},
    ),
    "MLX": (
        {"group_size": 64, "bits": 4},
        lambda w: {".weight": torch.zeros(len(w), 4, dtype=torch.uint32), ".scales": w[:, :1]},
    ),
    "EETQ's (quant_method eetq)": ({"quant_method": "eetq"}, codes(".weight", dtype=torch.int8)),
    "a later one (quant_method of_the_future)": ({"quant_method": "of_the_future"}, codes(".bits_of_it", dtype=torch.int32)),
}


@pytest.mark.parametrize("format", FOREIGN)
def test_a_checkpoint_in_a_format_that_is_not_read(own_model: Path, format: str) -> None:
    settings, store = FOREIGN[format]
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(own_model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        parts = {f"{module}{below}": part for below, part in store(tensor).items()} if ".experts." in name else {name: tensor}
        stored |= {name: part.contiguous() for name, part in parts.items()}
    save_file(stored, own_model / "model.safetensors")
    config = json.loads((own_model / "config.json").read_text()) | {"quantization_config": settings}
    (own_model / "config.json").write_text(json.dumps(config))
    message = refused(own_model)
    assert ".mlp.experts." in message
    named = format if "(" not in format else format[format.index("(") :]
    assert named in message
    assert "an unsupported format" in message
