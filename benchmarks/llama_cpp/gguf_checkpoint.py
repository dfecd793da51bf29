"""Converts a checkpoint to GGUF, llama.cpp's format: OLMoE, Qwen2-MoE or Qwen3-MoE, in Q8_0 or Q4_0.

Matrices are rounded by the ``gguf`` package, which also knows llama.cpp's names of the tensors. The router and vectors stay in
fp32; the embedding has the format of the head. llama.cpp runs OLMoE only with as many heads for keys as for queries.

    pip install -r benchmarks/runtimes/llama_cpp.txt
    python benchmarks/llama_cpp/gguf_checkpoint.py samples/top1 --format Q4_0 --head Q8_0 -o top1.gguf

A byte-level BPE tokenizer (``tokenizer.json``) is written too, so that llama.cpp's server can use the model. As in llama.cpp's
own converter, ids that it lacks become unused tokens.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Quantization

ARCHITECTURES = {
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
FORMATS = {"Q8_0": Quantization.Q8_0, "Q4_0": Quantization.Q4_0}
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
ROUTERS = (".mlp.gate", ".mlp.shared_expert_gate")
HEAD = ("lm_head", "model.embed_tokens")
NORMAL, CONTROL, UNUSED = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED


class Checkpoint:
    """The tensors of a folder of safetensors files, mapped and not read."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._tensors: dict[str, np.ndarray] = {}
        for path in sorted(folder.glob("*.safetensors")):
            mapped = np.memmap(path, np.uint8, "r")
            begin = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
            header = json.loads(mapped[8:begin].tobytes())
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                first, end = (begin + offset for offset in tensor["data_offsets"])
                self._tensors[name] = mapped[first:end].view(DTYPES[tensor["dtype"]]).reshape(tensor["shape"])

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def fp32(self, name: str) -> np.ndarray:
        return self._tensors[name].astype(np.float32)

    def weights(self) -> Iterator[tuple[str, list[str]]]:
        """Each tensor of the GGUF file as ``model.layers.0.mlp.experts.up_proj``, with the names of the tensors stacked in it."""
        experts = self.config["num_experts"]
        for name in self._tensors:
            before, expert, after = name.partition(".experts.")
            if not expert:
                yield name.removesuffix(".weight").removesuffix(".bias"), [name]
            elif after.startswith("0."):
                stacked = [f"{before}.experts.{number}.{after[2:]}" for number in range(experts)]
                yield f"{before}.experts.{after[2:].removesuffix('.weight')}", stacked
        if "lm_head.weight" not in self:
            yield "lm_head", ["model.embed_tokens.weight"]


def convert(folder: Path, output: Path, format: Quantization, head: Quantization) -> None:
    """Write the checkpoint in ``folder`` to ``output``, its matrices in ``format``, but head and embedding in ``head``.

    Raises:
        KeyError: the model type is not one of ``ARCHITECTURES``, or a tensor has a dtype that is not in ``DTYPES``.
        gguf.QuantError: the columns of a matrix are not a multiple of 32.
    """
    checkpoint = Checkpoint(folder)
    architecture = ARCHITECTURES[checkpoint.config["model_type"]]
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[architecture])
    write_sizes(writer, checkpoint.config)
    write_tokenizer(writer, folder / "tokenizer.json", checkpoint.config)
    names = gguf.get_tensor_name_map(architecture, checkpoint.config["num_hidden_layers"])
    for module, stacked in checkpoint.weights():
        name = names.get_name(module)
        if name is None:
            raise KeyError(f"llama.cpp has no tensor for {module}")
        values = [checkpoint.fp32(one) for one in stacked]
        suffix = "bias" if stacked[0].endswith(".bias") else "weight"
        if values[0].ndim == 1 or module.endswith(ROUTERS):
            writer.add_tensor(f"{name}.{suffix}", values[0].reshape(-1) if values[0].shape[0] == 1 else values[0])
            continue
        kept = head if module in HEAD else format
        rounded = [gguf.quants.quantize(matrix, kept) for matrix in values]
        writer.add_tensor(f"{name}.{suffix}", np.stack(rounded) if ".experts." in module else rounded[0], raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config.get("intermediate_size", 0))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6 if config["model_type"] != "olmoe" else 1e-5))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def write_tokenizer(writer: gguf.GGUFWriter, path: Path, config: dict[str, Any]) -> None:
    described = json.loads(path.read_text()) if path.is_file() else {}
    model = described.get("model", {})
    tokens = {number: token for token, number in model.get("vocab", {}).items()}
    special = {token["id"]: token["content"] for token in described.get("added_tokens", ())}
    tokens |= special
    if model.get("type") != "BPE" or len(tokens) > config["vocab_size"]:
        writer.add_tokenizer_model("none")
        return
    unused = {number: f"[PAD{number}]" for number in range(config["vocab_size"]) if number not in tokens}
    tokens |= unused
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[number] for number in range(len(tokens))])
    types = dict.fromkeys(special, CONTROL) | dict.fromkeys(unused, UNUSED)
    writer.add_token_types([types.get(number, NORMAL) for number in range(len(tokens))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="Q8_0")
    parser.add_argument("--head", choices=FORMATS, default="Q8_0", help="format of the head and the embedding")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    convert(arguments.checkpoint, arguments.output, FORMATS[arguments.format], FORMATS[arguments.head])


if __name__ == "__main__":
    main()
