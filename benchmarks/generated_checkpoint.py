"""A checkpoint of random weights in the shapes of a published model, written tensor by tensor into shards of a given size.

It is stored in bf16; or with the matrices of attention and experts in FP8, with a scale for 128 x 128 (like DeepSeek-V3); or with
those of the experts in MXFP4 (compressed-tensors' mxfp4-pack-quantized).

Its router has random weights: measurements with this checkpoint say nothing about accuracy or balance.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np
from shards import SHARD, Tensors, bytes_of, write_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
AT_ONCE = 1 << 22  # weights that are drawn at a time
Shapes = dict[str, tuple[int, ...]]
Storage = Literal["bf16", "fp8", "mxfp4"]
QUANTIZATION: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "mxfp4": {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {
            "experts": {
                "targets": ["re:.*experts.*"],
                "format": "mxfp4-pack-quantized",
                "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
            }
        },
    },
}


ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "olmoe": "OlmoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


@dataclass(frozen=True)
class Model:
    """The sizes of an OLMoE ("olmoe"), Mixtral ("mixtral") or Qwen3-MoE ("qwen3_moe")."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    vocabulary: int
    storage: Storage = "bf16"
    head_size: int | None = None  # if not hidden / heads

    def of(self, layers: int) -> "Model":
        return replace(self, layers=layers)

    @property
    def config(self) -> dict[str, Any]:
        mixtral, qwen = self.model_type == "mixtral", self.model_type == "qwen3_moe"
        return {
            "model_type": self.model_type,
            "architectures": [ARCHITECTURES[self.model_type]],
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "moe_intermediate_size" if qwen else "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts" if mixtral else "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **({"head_dim": self.head_size, "norm_topk_prob": True} if qwen else {}),
            **({"quantization_config": QUANTIZATION[self.storage]} if self.storage != "bf16" else {}),
        }

    @property
    def shapes(self) -> Shapes:
        """Tensor name -> shape, in the order of the file."""
        hidden, head = self.hidden, self.head_size or self.hidden // self.heads
        query, kv = head * self.heads, head * self.kv_heads
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes |= {f"{at}.self_attn.{p}_proj.weight": (kv if p in "kv" else query, hidden) for p in "qkv"}
            shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, query)
            shapes |= {f"{at}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
            if self.model_type == "qwen3_moe":
                shapes |= {f"{at}.self_attn.{p}_norm.weight": (head,) for p in "qk"}
            if self.model_type == "olmoe":
                shapes |= {f"{at}.self_attn.q_norm.weight": (hidden,), f"{at}.self_attn.k_norm.weight": (kv,)}
            moe = f"{at}.block_sparse_moe" if self.model_type == "mixtral" else f"{at}.mlp"
            gate, up, down = ("w1", "w3", "w2") if self.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
            shapes[f"{moe}.gate.weight"] = (self.experts, hidden)
            for expert in range(self.experts):
                shapes |= {f"{moe}.experts.{expert}.{p}.weight": (self.intermediate, hidden) for p in (gate, up)}
                shapes[f"{moe}.experts.{expert}.{down}.weight"] = (hidden, self.intermediate)
        return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocabulary, hidden)}

    @property
    def tensors(self) -> Tensors:
        """The stored tensors: name -> dtype and shape, in the order of the file."""
        stored: Tensors = {}
        for name, shape in self.shapes.items():
            if self.storage == "fp8" and ("_proj.weight" in name or ".experts." in name):
                stored[name] = "F8_E4M3", shape
                stored[f"{name}_scale_inv"] = "F32", tuple(-(-size // 128) for size in shape)
            elif self.storage == "mxfp4" and ".experts." in name:
                rows, columns = shape
                stored[f"{name}_packed"] = "U8", (rows, columns // 2)
                stored[f"{name}_scale"] = "U8", (rows, columns // 32)
            else:
                stored[name] = "BF16", shape
        return stored

    @property
    def bytes(self) -> int:
        return sum(map(bytes_of, self.tensors.values()))

    @property
    def layer_bytes(self) -> int:
        """Bytes of the experts of one layer, in bf16."""
        return 6 * self.experts * self.hidden * self.intermediate


FP8: Storage = "fp8"
MXFP4: Storage = "mxfp4"
OLMOE_1B_7B = Model("olmoe", 16, 2048, 1024, 64, 8, 16, 16, 50304)
QWEN3_30B_A3B = Model("qwen3_moe", 48, 2048, 768, 128, 8, 32, 4, 151936, head_size=128)
MIXTRAL_8X7B = Model("mixtral", 32, 4096, 14336, 8, 2, 32, 8, 32000)
SMALL = Model("olmoe", 4, 512, 512, 32, 4, 8, 8, 4096)  # 218 MB
SMALL_MIXTRAL = Model("mixtral", 8, 512, 1024, 8, 2, 8, 4, 4096)
# Twice as deep, so that FP8 takes what bf16 does.
OLMOE_FP8, OLMOE_MXFP4 = (replace(OLMOE_1B_7B, layers=32, storage=storage) for storage in (FP8, MXFP4))
SMALL_FP8, SMALL_MXFP4 = (replace(SMALL, layers=8, storage=storage) for storage in (FP8, MXFP4))


def generate(model: Model, folder: Path, shard_bytes: int = SHARD, seed: int = 0) -> Path:
    """Create ``folder``, write the checkpoint into it, and return it."""

    def fill(file: BinaryIO, tensors: Tensors, number: int) -> None:
        random = np.random.default_rng([seed, number])
        for name, (dtype, shape) in tensors.items():
            for values in _values(name, dtype, shape, random):
                file.write(values.data)

    return write_checkpoint(folder, model.config, model.tensors, fill, shard_bytes)


def _values(name: str, dtype: str, shape: tuple[int, ...], random: np.random.Generator) -> Iterator[np.ndarray]:
    """Bytes of a tensor. The values are such that a projection's outputs have about the magnitude of its inputs."""
    count = math.prod(shape)
    for start in range(0, count, AT_ONCE):
        size = min(AT_ONCE, count - start)
        if dtype == "U8":  # pairs of float4_e2m1, of about 2.5 each, or exponents
            scale = round(math.log2(0.4 / math.sqrt(32 * shape[1])))
            yield np.full(size, 127 + scale, np.uint8) if name.endswith("_scale") else random.integers(0, 256, size, np.uint8)
        elif dtype == "F8_E4M3":  # about 1 each
            yield random.standard_normal(size, np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        elif dtype == "F32":
            yield np.full(size, 1 / math.sqrt(128 * shape[1]), np.float32)
        elif len(shape) == 1:
            yield np.ones(size, BF16).view(np.uint16)
        else:
            values = random.standard_normal(size, np.float32) / np.float32(math.sqrt(shape[1]))
            yield values.astype(BF16).view(np.uint16)
