"""The transformers model of a checkpoint: with its weights, or on the meta device with none."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging

from rq_compile.architectures.configuration import model_config
from rq_compile.architectures.dense import dense_tensor
from rq_compile.architectures.layers import MoeLayer, expert_weights, moe_layers
from rq_compile.architectures.remote import REMOTE_CLASSES
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.errors import UserError

# One product per expert that has tokens. "batched_mm" would gather whole weight matrices per token.
EXPERTS_IMPLEMENTATION = "grouped_mm"


def load_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model in fp32 on the CPU, in eval mode, without gradients.

    transformers loads its own families; the others are read tensor by tensor into an empty model. Either way no second
    copy of the weights is held.

    Raises:
        UserError: see ``moe_layers`` and ``dense_tensor``.
    """
    layers = moe_layers(checkpoint)
    if checkpoint.model_type in REMOTE_CLASSES:
        model = meta_model(checkpoint)
        _fill(model, checkpoint, layers)
    else:
        config = model_config(checkpoint)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = _from_pretrained(auto_class, checkpoint)
        _choose_experts_implementation(model)
    return model.eval().requires_grad_(False)


def meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The same module as ``load_model`` gives, its parameters on the meta device.

    Buffers that no checkpoint holds (the rotary embeddings' frequencies) are real.
    """
    config = model_config(checkpoint)
    with torch.device("meta"):
        if checkpoint.model_type in REMOTE_CLASSES:
            model = REMOTE_CLASSES[checkpoint.model_type]._from_config(config, dtype=torch.float32)
        else:
            auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model = auto_class.from_config(config, dtype=torch.float32)
    for module in model.modules():
        if module._non_persistent_buffers_set:
            real = type(module)(config)
            for name in module._non_persistent_buffers_set:
                module.register_buffer(name, getattr(real, name), persistent=False)
    _choose_experts_implementation(model)
    return model.eval().requires_grad_(False)


def materialize(
    model: PreTrainedModel, checkpoint: Checkpoint, name: str = "", device: str = "cpu", without: str | None = None
) -> None:
    """Give what the module ``name`` of a meta model holds its values, in fp32 on ``device``: all but the module ``without``.

    Raises:
        UserError: the checkpoint has no such tensor, or one of another shape.
    """
    module = model.get_submodule(name)
    for below, tensor in [*module.named_parameters(), *module.named_buffers()]:
        path = f"{name}.{below}" if name else below
        owner, _, attribute = path.rpartition(".")
        if without is not None and path.startswith(f"{without}."):
            continue
        value = _fp32(dense_tensor(checkpoint, path)) if tensor.is_meta else tensor.detach()
        if value.shape != tensor.shape:
            raise UserError(
                f"{path} has shape {list(value.shape)} where {list(tensor.shape)} is expected; check the model's config.json", 2
            )
        value = value.to(device)
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value)


def _from_pretrained(auto_class: Any, checkpoint: Checkpoint) -> PreTrainedModel:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = auto_class.from_pretrained(checkpoint.path, dtype=torch.float32, output_loading_info=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    # transformers fills what is missing with random values and only logs it.
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{checkpoint.path} has no tensor for {missing[0]} ({len(missing)} missing in all); download the checkpoint again", 2
        )
    return model


def _choose_experts_implementation(model: PreTrainedModel) -> None:
    # Switch has experts of its own, outside the experts interface.
    if not model.config.is_encoder_decoder:
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)


def _fill(model: PreTrainedModel, checkpoint: Checkpoint, layers: list[MoeLayer]) -> None:
    """Give every meta parameter of a gated model without expert biases its values."""
    for layer in layers:
        module: Any = model.get_submodule(layer.name)
        up = torch.empty(module.gate_up_proj.shape)
        down = torch.empty(module.down_proj.shape)
        for expert in range(layer.geometry.experts):
            weights = expert_weights(checkpoint, layer, expert)
            up[expert], down[expert] = _fp32(weights.up), _fp32(weights.down)
        module.gate_up_proj, module.down_proj = nn.Parameter(up), nn.Parameter(down)
    materialize(model, checkpoint)
    model.tie_weights()


def _fp32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))
