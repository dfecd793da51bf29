"""Writes an OLMoE checkpoint as a GGUF file in Q8_0 for llama.cpp, with a vocabulary of made-up words: prompts are token ids.

Uses the package gguf from the sources of llama.cpp.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
PROJECTIONS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
KEPT = ("norm", "gate_inp")  # in fp32


def convert(checkpoint: Path, config: dict, output: Path, llama_cpp: Path) -> None:
    """``config``: the checkpoint's ``config.json``. ``llama_cpp``: the folder of its sources."""
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    import gguf

    writer = gguf.GGUFWriter(output, "olmoe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-5))
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    words = [f"<{token}>" for token in range(config["vocab_size"])]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)

    files = [safe_open(path, framework="pt") for path in sorted(checkpoint.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no dictionary

    def read(name: str) -> np.ndarray:
        return where[f"{name}.weight"].get_tensor(f"{name}.weight").to(torch.float32).numpy()

    def write(name: str, values: np.ndarray) -> None:
        if any(word in name for word in KEPT):
            writer.add_tensor(f"{name}.weight", values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    write("token_embd", read("model.embed_tokens"))
    write("output_norm", read("model.norm"))
    tied = config.get("tie_word_embeddings")
    if not tied:
        write("output", read("lm_head"))
    for layer in range(config["num_hidden_layers"]):
        of, to = f"model.layers.{layer}", f"blk.{layer}"
        for name, own in NAMES.items():
            write(f"{to}.{own}", read(f"{of}.{name}"))
        for projection, own in PROJECTIONS.items():
            experts = (read(f"{of}.mlp.experts.{expert}.{projection}") for expert in range(config["num_experts"]))
            write(f"{to}.{own}", np.stack(list(experts)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
