"""A checkpoint of random weights in the shapes of a published model, written tensor by tensor into shards of a given size.

Its router chooses as random weights do: nothing that is measured with it says anything about accuracy or balance.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

TOKENIZER = Path(__file__).parents[1] / "samples" / "olmoe" / "tokenizer.json"
BF16 = np.dtype(ml_dtypes.bfloat16)
AT_ONCE = 1 << 22  # weights that are drawn at a time
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """The sizes of an OLMoE ("olmoe") or Mixtral ("mixtral")."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    vocabulary: int

    def of(self, layers: int) -> "Model":
        return replace(self, layers=layers)

    @property
    def config(self) -> dict[str, object]:
        mixtral = self.model_type == "mixtral"
        return {
            "model_type": self.model_type,
            "architectures": ["MixtralForCausalLM" if mixtral else "OlmoeForCausalLM"],
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
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
        }

    @property
    def shapes(self) -> Shapes:
        """Tensor name -> shape, in the order of the file."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes |= {f"{at}.self_attn.{p}_proj.weight": (kv if p in "kv" else hidden, hidden) for p in "qkv"}
            shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
            shapes |= {f"{at}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
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
    def bytes(self) -> int:
        return sum(2 * math.prod(shape) for shape in self.shapes.values())

    @property
    def layer_bytes(self) -> int:
        """Of the experts of one layer."""
        return 6 * self.experts * self.hidden * self.intermediate


OLMOE_1B_7B = Model("olmoe", 16, 2048, 1024, 64, 8, 16, 16, 50304)
MIXTRAL_8X7B = Model("mixtral", 32, 4096, 14336, 8, 2, 32, 8, 32000)
SMALL = Model("olmoe", 4, 512, 512, 32, 4, 8, 8, 4096)  # 218 MB
SMALL_MIXTRAL = Model("mixtral", 8, 512, 1024, 8, 2, 8, 4, 4096)


def generate(model: Model, folder: Path, shard_bytes: int = 5 * 10**9, seed: int = 0) -> Path:
    """Write the checkpoint into ``folder``, which is made, and return it."""
    folder.mkdir(parents=True)
    shards = list(_shards(model.shapes, shard_bytes))
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / name, shapes, np.random.default_rng([seed, number]))
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {"total_size": model.bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(model.config, indent=1))
    shutil.copy(TOKENIZER, folder)
    return folder


def _shards(shapes: Shapes, shard_bytes: int) -> Iterator[Shapes]:
    shard: Shapes = {}
    size = 0
    for name, shape in shapes.items():
        bytes = 2 * math.prod(shape)
        if shard and size + bytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += bytes
    yield shard


def _write(path: Path, shapes: Shapes, random: np.random.Generator) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape in shapes.values():
            for values in _values(shape, random):
                file.write(values.astype(BF16).view(np.uint16).data)


def _values(shape: tuple[int, ...], random: np.random.Generator) -> Iterator[np.ndarray]:
    """fp32; what a projection gives has about the size of what it was given."""
    count = math.prod(shape)
    for start in range(0, count, AT_ONCE):
        size = min(AT_ONCE, count - start)
        if len(shape) == 1:
            yield np.ones(size, np.float32)
        else:
            yield random.standard_normal(size, np.float32) / np.float32(math.sqrt(shape[1]))
