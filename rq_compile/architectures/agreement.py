"""A config held against the tensors: config.json is small and may say anything, the tensors' bytes are there.

First the sizes, before anything is built from them: a loop over a billion layers or a table of a billion heads is refused here.
Then, with the empty model at hand, the shape of every tensor.
"""

from typing import TYPE_CHECKING

from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from rq_compile.architectures.model import Model

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
    largest = max((max(tensor.shape, default=1) for tensor in checkpoint.stored_tensors()), default=1)
    limits = dict.fromkeys(DIMENSIONS, (1, largest)) | dict.fromkeys(OPTIONAL_DIMENSIONS, (0, largest))
    limits |= dict.fromkeys(LAYERS, (1, len(checkpoint.names)))
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


def check_tensors(model: "Model", empty: "PreTrainedModel") -> None:
    """Of all non-expert weights; ``moe_layers`` has compared those of the experts. ``empty`` is the model without weights.

    Raises:
        UserError: a tensor is missing, or its shape is not the model's.
    """
    inside = tuple(f"{layer.name}." for layer in model.layers)
    for parameter, tensor in empty.state_dict().items():
        if parameter.startswith(inside):
            continue
        if model.shape(parameter) != tuple(tensor.shape):
            raise UserError(
                f"{model.tensor(parameter)} of {model.path} has shape {list(model.shape(parameter))} where its config.json asks "
                f"for {list(tensor.shape)}; download the checkpoint again",
                2,
            )
