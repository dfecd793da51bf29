"""Train a sample model from scratch on the CPU until its held-out loss has flattened.

    python samples/prepare_text.py --training-text DIR
    python samples/train.py olmoe --training-text DIR

Writes ``samples/<name>/``: the checkpoint (bf16 safetensors, config, tokenizer) and ``loss.csv``, the held-out loss curve.
The learning rate is constant after a short warm-up and falls linearly to zero over the last quarter of the steps. ``--resume``
trains the existing checkpoint for as many additional steps and continues its curve, until the curve has flattened.

``olmoe`` and ``qwen2-moe`` are the samples of the demo. ``top1`` (8 experts, one per token, as in Switch-base-8) and
``deepseek-v2`` (64 small experts, six per token, and two shared ones) are further models for the benchmarks.
"""

import copy
import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

SEQUENCE = 256
BATCH = 16
KINDS = ("scripture", "hacker", "dictionary")


def olmoe(vocabulary: int) -> PreTrainedModel:
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_experts=16,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            router_aux_loss_coef=0.005,
            output_router_logits=True,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def qwen2_moe(vocabulary: int) -> PreTrainedModel:
    """A dense first layer, then layers with 12 experts (top 3, normalised) and one shared expert."""
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=vocabulary,
            hidden_size=192,
            intermediate_size=384,
            moe_intermediate_size=96,
            shared_expert_intermediate_size=192,
            num_hidden_layers=4,
            mlp_only_layers=[0],
            num_attention_heads=6,
            num_key_value_heads=2,
            num_experts=12,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            router_aux_loss_coef=0.002,
            output_router_logits=True,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def top1(vocabulary: int) -> PreTrainedModel:
    """Few wide experts, top 1, with a gate that is not normalised; no loss balances the experts."""
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=vocabulary,
            hidden_size=160,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=8,
            num_experts_per_tok=1,
            norm_topk_prob=False,
            router_aux_loss_coef=0.002,
            output_router_logits=True,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def deepseek_v2(vocabulary: int) -> PreTrainedModel:
    """A dense first layer, latent attention, then 64 experts of a few neurons; its class has no loss that balances them."""
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=32,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=64,
            qk_rope_head_dim=16,
            qk_nope_head_dim=32,
            v_head_dim=32,
            n_routed_experts=64,
            num_experts_per_tok=6,
            n_shared_experts=2,
            topk_method="greedy",
            n_group=1,
            routed_scaling_factor=1.0,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


ARCHITECTURES = {"olmoe": (olmoe, 1600), "qwen2-moe": (qwen2_moe, 1000), "top1": (top1, 1000), "deepseek-v2": (deepseek_v2, 1000)}


def token_stream(tokenizer: PreTrainedTokenizerBase, paths: list[Path]) -> np.ndarray:
    return np.concatenate([np.asarray(tokenizer(path.read_text())["input_ids"], dtype=np.int64) for path in paths])


def batches(tokens: np.ndarray, generator: np.random.Generator) -> Iterator[torch.Tensor]:
    while True:
        starts = generator.integers(0, len(tokens) - SEQUENCE, BATCH)
        yield torch.from_numpy(np.stack([tokens[start : start + SEQUENCE] for start in starts]))


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, tokens: np.ndarray) -> float:
    """Mean next-token cross entropy in nats over whole windows of the held-out text."""
    windows = torch.from_numpy(tokens[: len(tokens) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE))
    losses = []
    for chunk in windows.split(BATCH):
        logits = model(chunk, output_router_logits=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), chunk[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).mean().item()


def schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 100, max(0.0, (steps - step) / (steps / 4)))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    checkpoint: Any = copy.deepcopy(model)
    checkpoint.to(torch.bfloat16)
    checkpoint.config.output_router_logits = False
    checkpoint.save_pretrained(output)
    tokenizer.save_pretrained(output)


def last_step(curve: Path) -> int:
    return int(curve.read_text().splitlines()[-1].split(",")[0])


def resumed(output: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    model.config.output_router_logits = True
    return model


@click.command()
@click.argument("name", type=click.Choice(list(ARCHITECTURES)))
@click.option("--training-text", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--steps", type=int, help="Optimizer steps of 4096 tokens.")
@click.option("--output", type=click.Path(path_type=Path), help="Default: samples/NAME.")
@click.option("--resume", is_flag=True, help="Continue to train the checkpoint in --output.")
@click.option("--learning-rate", type=float, default=2e-3, show_default=True)
def main(name: str, training_text: Path, steps: int | None, output: Path | None, resume: bool, learning_rate: float) -> None:
    """Train the sample model NAME."""
    torch.manual_seed(0)
    build, default_steps = ARCHITECTURES[name]
    steps = steps or default_steps
    samples = Path(__file__).parent
    output = output or samples / name
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(training_text / "tokenizer")
    training = token_stream(tokenizer, [training_text / f"{kind}.txt" for kind in KINDS])
    heldout = {kind: token_stream(tokenizer, [samples / "text" / f"{kind}.heldout.txt"]) for kind in (*KINDS, "satire")}
    trained = last_step(output / "loss.csv") if resume else 0
    model = resumed(output) if resume else build(len(tokenizer))
    model.set_experts_implementation("grouped_mm")
    click.echo(f"{name}: {model.num_parameters() / 1e6:.2f} M parameters, {len(training)} training tokens, {steps} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    stream = batches(training, np.random.default_rng(trained))
    with open(output / "loss.csv", "a" if resume else "w", newline="") as curve:
        writer = csv.writer(curve)
        if not resume:
            writer.writerow(["step", "tokens", "training", *heldout])
        start, running = time.monotonic(), []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step, steps)
            batch = next(stream)
            loss = model(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running.append(loss.item())
            if (step + 1) % 200 == 0 or step + 1 == steps:
                losses = {kind: heldout_loss(model, tokens) for kind, tokens in heldout.items()}
                total = trained + step + 1
                means = [f"{loss:.4f}" for loss in (np.mean(running), *losses.values())]
                writer.writerow([total, total * BATCH * SEQUENCE, *means])
                curve.flush()
                rate = (step + 1) * BATCH * SEQUENCE / (time.monotonic() - start)
                click.echo(f"step {step + 1}: training {np.mean(running):.3f}, held-out {losses}, {rate:.0f} tokens/s")
                running = []
                save(model, tokenizer, output)


if __name__ == "__main__":
    main()
