"""The transformers model of a checkpoint: with its weights, or without weights on the meta device.

No code of a checkpoint is ever run, so there is no ``--trust-remote-code``. The classes of every supported family are in
transformers or in ``remote.py``; running a checkpoint's code alone would not be enough to export other families. transformers
gets the config and the tensors that ``Model`` has checked, never the folder. From the folder, it would follow an
``adapter_config.json`` to another repository, unpickle a distributed checkpoint's ``.metadata``, or use other weights than the
rest of rq-compile.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from rq_compile.architectures.interface import put_behind_interface
from rq_compile.architectures.layers import MoeLayer
from rq_compile.architectures.model import Model
from rq_compile.architectures.quiet import quiet_transformers
from rq_compile.architectures.remote import REMOTE_CLASSES
from rq_compile.architectures.ties import break_ties_by_number
from rq_compile.architectures.traced import set_experts_implementation
from rq_compile.checkpoint.checkpoint import Checkpoint
from rq_compile.checkpoint.mapped import mapped
from rq_compile.errors import UserError, reason
from rq_compile.processes import on_this_host
from rq_compile.quantization.quantizer import torch_tensor
from rq_compile.standalone.limits import default_threads

# One product per expert with tokens: "grouped_mm" in one call, which needs rows of multiples of 16 bytes, or "eager" in a loop.
# "batched_mm" would gather whole weight matrices per token.
GROUPED, LOOP = "grouped_mm", "eager"
ALIGNMENT = 16


def load_model(model: Model) -> PreTrainedModel:
    """The model in fp32 on the CPU, in eval mode, without gradients. Experts that tie are chosen as described in ``ties``.

    transformers converts the weights of its own families, which temporarily takes about 2.5 times their fp32 bytes. The weights
    of other families are read tensor by tensor into an empty model.

    Raises:
        UserError: a weight is not finite.
    """
    loaded = meta_model(model)
    if model.model_type in REMOTE_CLASSES:
        _fill(loaded, model)
    else:
        loaded = _converted(type(loaded), model)
        _choose_experts_implementation(loaded, model.layers)
    break_ties_by_number(loaded, model.layers)
    return loaded.eval().requires_grad_(False)


@contextmanager
def torch_threads(threads: int | None = None) -> Iterator[None]:
    """A context in which torch computes on ``threads`` threads, by default on as many as this process may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or min(before, max(1, default_threads() // on_this_host())))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def meta_model(model: Model) -> PreTrainedModel:
    """The same module as from ``load_model``, with its parameters on the meta device. Each caller gets its own copy.

    Buffers that no checkpoint holds (the rotary embeddings' frequencies) are real.

    """
    empty = deepcopy(model.without_weights)
    _choose_experts_implementation(empty, model.layers)
    return empty


def built_without_weights(checkpoint: Checkpoint, config: PretrainedConfig) -> PreTrainedModel:
    """The model that ``Model.without_weights`` keeps.

    Raises:
        UserError: the config does not describe a model that can be built.
    """
    try:
        empty = _empty(_model_class(checkpoint.model_type, config), config)
    except Exception as error:  # a config may be wrong in any way
        raise UserError(
            f"{checkpoint.path / 'config.json'} does not describe a model that can be built ({reason(error)}); correct it", 2
        ) from error
    return empty.eval().requires_grad_(False)


def _model_class(model_type: str, config: PretrainedConfig) -> type[PreTrainedModel]:
    if model_type in REMOTE_CLASSES:
        return REMOTE_CLASSES[model_type]
    mapping: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping[type(config)]


def _empty(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=torch.float32)
    for module in model.modules():
        if module._non_persistent_buffers_set:
            real = type(module)(config)
            for name in module._non_persistent_buffers_set:
                module.register_buffer(name, getattr(real, name), persistent=False)
    return model


def materialize(
    empty: PreTrainedModel, model: Model, name: str = "", device: str = "cpu", without: str | None = None, deep: bool = True
) -> None:
    """Load the values of the module ``name`` of a meta model, in fp32 on ``device``, except those of the module ``without``.
    Values of submodules are only loaded if ``deep``.

    Raises:
        UserError: a value is not finite.
    """
    module = empty.get_submodule(name)
    for below, tensor in [*module.named_parameters(recurse=deep), *module.named_buffers(recurse=deep)]:
        path = f"{name}.{below}" if name else below
        owner, _, attribute = path.rpartition(".")
        if without is not None and path.startswith(f"{without}."):
            continue
        value = (_fp32(model.read(path)) if tensor.is_meta else tensor.detach()).to(device)
        setattr(empty.get_submodule(owner), attribute, nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value)


def _converted(model_class: type[PreTrainedModel], model: Model) -> PreTrainedModel:
    """The model with the checkpoint's tensors, which transformers renames and stacks."""
    with quiet_transformers():
        loaded = model_class.from_pretrained(
            None,
            config=deepcopy(model.config),
            state_dict=mapped(model.checkpoint, model.used),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    return put_behind_interface(loaded)


def _choose_experts_implementation(module: PreTrainedModel, layers: Iterable[MoeLayer]) -> None:
    rows = [4 * size for layer in layers for size in (layer.geometry.hidden, layer.geometry.intermediate)]
    set_experts_implementation(module, GROUPED if all(size % ALIGNMENT == 0 for size in rows) else LOOP)


def _fill(empty: PreTrainedModel, model: Model) -> None:
    """Load the values of every meta parameter of a gated model without expert biases."""
    for layer in model.layers:
        module: Any = empty.get_submodule(layer.name)
        up = torch.empty(module.gate_up_proj.shape)
        down = torch.empty(module.down_proj.shape)
        for expert in range(layer.geometry.experts):
            weights = model.expert(layer, expert)
            up[expert], down[expert] = _fp32(weights.up), _fp32(weights.down)
        module.gate_up_proj, module.down_proj = nn.Parameter(up), nn.Parameter(down)
    materialize(empty, model)
    if model.agreement.tied:
        empty.tie_weights()


def _fp32(array: np.ndarray) -> torch.Tensor:
    return torch_tensor(array).float()
