"""Differences between model families: the modules of the experts, how experts are stored, and different names on disk.

Names come in two kinds: the *parameter* name in the transformers model, and the *tensor* name in the checkpoint.
"""

import re
from dataclasses import dataclass

from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError

DECODER_EXPERTS = "model.layers.{layer}.mlp.experts"


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    ``experts`` (and ``decoder_experts`` of an encoder-decoder model) name the experts module of a layer. ``renames`` turn a
    parameter name into a tensor name (regular expression, replacement; all are applied in turn). ``up`` and ``down`` are an
    expert's tensors below the experts module's tensor name, with ``{e}`` as its number; several ``up`` are stacked by rows.
    Experts that are stored as one tensor (``gate_up_proj [E, F, hidden]``, ``down_proj [E, hidden, intermediate]``) are
    found without a declaration. ``top_k``: for families whose config has no ``num_experts_per_tok``. ``activation``: the
    config's key of the activation. ``transposed``: the stacked tensors are ``[E, in, out]`` with interleaved gate and up rows,
    there are biases, and the activation is clamped (GPT-OSS).
    """

    model_type: str
    experts: str = DECODER_EXPERTS
    decoder_experts: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    up: tuple[str, ...] = ("{e}.gate_proj.weight", "{e}.up_proj.weight")
    down: str = "{e}.down_proj.weight"
    top_k: int | None = None
    activation: str = "hidden_act"
    transposed: bool = False
    tied: tuple[str, ...] = ("lm_head.weight",)
    tied_to: str = "model.embed_tokens.weight"

    def tensor_name(self, parameter: str) -> str:
        for pattern, replacement in self.renames:
            parameter = re.sub(pattern, replacement, parameter)
        return parameter


BLOCK_SPARSE = (r"\.mlp\.", ".block_sparse_moe.")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("olmoe"),
        Family("mixtral", renames=(BLOCK_SPARSE,), up=("{e}.w1.weight", "{e}.w3.weight"), down="{e}.w2.weight"),
        Family("qwen2_moe"),
        Family("qwen3_moe"),
        Family(
            "phimoe",
            renames=(BLOCK_SPARSE, (r"\.router\.weight$", ".gate.weight")),
            up=("{e}.w1.weight", "{e}.w3.weight"),
            down="{e}.w2.weight",
        ),
        Family("deepseek_v2"),
        Family("deepseek_v3"),
        Family("gpt_oss", transposed=True),
        Family(
            "granitemoe",
            experts="model.layers.{layer}.block_sparse_moe.experts",
            renames=(
                (r"\.experts\.gate_up_proj$", ".input_linear.weight"),
                (r"\.experts\.down_proj$", ".output_linear.weight"),
                (r"\.router\.weight$", ".router.layer.weight"),
            ),
        ),
        Family(
            "switch_transformers",
            experts="encoder.block.{layer}.layer.1.mlp.experts",
            decoder_experts="decoder.block.{layer}.layer.2.mlp.experts",
            up=("expert_{e}.wi.weight",),
            down="expert_{e}.wo.weight",
            top_k=1,
            activation="dense_act_fn",
            tied=("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
            tied_to="shared.weight",
        ),
        Family(
            "llama_moe",
            renames=((r"\.mlp\.experts", ".mlp.calculator.experts"),),
            up=("weight_gate.{e}", "weight_up.{e}"),
            down="weight_down.{e}",
        ),
        Family("deepseek"),
    )
}


def known_family(checkpoint: Checkpoint) -> None:
    """
    Raises:
        UserError: the model has no experts, or its ``model_type`` is neither declared here nor one of transformers.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if checkpoint.model_type in FAMILIES:
        return
    if not any(part in name for name in checkpoint.names for part in ("expert", "block_sparse_moe", "moe")):
        raise UserError(
            f"{checkpoint.path} is not an MoE: the model {checkpoint.model_type} has no experts; give a sparse MoE checkpoint", 2
        )
    if checkpoint.model_type not in CONFIG_MAPPING_NAMES:
        code = " (it needs its own code, auto_map, which is never run)" if checkpoint.config.get("auto_map") else ""
        raise UserError(
            f"{checkpoint.path} has the model_type {checkpoint.model_type}{code}, which is not in the installed transformers; "
            f"use a family of transformers or one of {', '.join(sorted(FAMILIES))}",
            2,
        )
