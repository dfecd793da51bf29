"""A config held against the tensors: config.json is small and may say anything, the tensors' bytes are there.

First the sizes, before anything is built from them: a loop over a billion layers or a table of a billion heads is refused here.
Then, with the empty model at hand, the shape of every tensor.
"""

from typing import TYPE_CHECKING

from rq_compile.architectures.dense import dense_name
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What a config calls the dimensions of its tensors. Those of the second row may be 0 or null, where a family goes without.
DIMENSIONS = (
    *("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
)
OPTIONAL_DIMENSIONS = (
    *("intermediate_size", "shared_expert_intermediate_size", "n_shared_experts", "head_dim", "q_lora_rank", "kv_lora_rank"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "d_kv", "d_ff", "n_group", "topk_group", "first_k_dense_replace"),
)
LAYERS = ("num_hidden_layers", "num_decoder_layers")


def check_sizes(checkpoint: Checkpoint, config: "PretrainedConfig") -> None:
    """
    Raises:
        UserError: a size that the config states is no whole number, or larger than any of the tensors can bear out.
    """
    largest = max((max(tensor.shape, default=1) for tensor in checkpoint.tensors.values()), default=1)
    limits = dict.fromkeys(DIMENSIONS, (1, largest)) | dict.fromkeys(OPTIONAL_DIMENSIONS, (0, largest))
    limits |= dict.fromkeys(LAYERS, (1, len(checkpoint.tensors)))
    for key, (least, most) in limits.items():
        value = getattr(config, key, None)
        if not hasattr(config, key) or (value is None and least == 0):
            continue
        if type(value) is not int or not least <= value <= most:
            shown = repr(value)[:40]
            raise UserError(
                f"{checkpoint.path / 'config.json'} says {key} {shown}, which its tensors do not allow ({least} to {most}); "
                "download the checkpoint again",
                2,
            )


def check_tensors(checkpoint: Checkpoint, model: "PreTrainedModel", experts: list[str]) -> None:
    """``model`` is the empty model, ``experts`` its experts modules, whose tensors ``moe_layers`` has compared.

    Raises:
        UserError: a tensor is missing, or its shape is not the model's.
    """
    inside = tuple(f"{module}." for module in experts)
    for parameter, tensor in model.state_dict().items():
        if parameter.startswith(inside):
            continue
        name = dense_name(checkpoint, parameter)
        if checkpoint.shape(name) != tuple(tensor.shape):
            raise UserError(
                f"{name} of {checkpoint.path} has shape {list(checkpoint.shape(name))} where its config.json asks for "
                f"{list(tensor.shape)}; download the checkpoint again",
                2,
            )
