"""Experts that transformers runs outside of its experts interface compute the same behind it."""

from copy import deepcopy
from typing import Any

import model_types
import plans
import pytest
import torch

from rq_compile.architectures.interface import put_behind_interface
from rq_compile.architectures.traced import set_experts_implementation

# Of models that read images, too, the language model alone: that of Llama 4 fails on a text without images in transformers 5.24.
LANGUAGE_MODELS = {"llama4": "language_model", "llama4_text": "", "step3p7": "model.language_model"}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_transformers_own_forward_gives_the_same(model_type: str, implementation: str) -> None:
    torch.manual_seed(0)
    model = model_types.model_of(model_types.config_of(model_type)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.15)
    behind = put_behind_interface(deepcopy(model))
    set_experts_implementation(behind, implementation)
    ids = torch.from_numpy(plans.tokens(2, 20))

    def outputs(whole: Any) -> torch.Tensor:
        return whole.get_submodule(LANGUAGE_MODELS[model_type])(input_ids=ids)[0]

    with torch.no_grad():
        expected = outputs(model)
        torch.testing.assert_close(outputs(behind), expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.1


def test_llama_4_reads_a_text_without_images() -> None:
    model = model_types.model_of(model_types.config_of("llama4")).eval()
    ids = torch.from_numpy(plans.tokens(2, 20))
    with torch.no_grad():
        expected = model.language_model(input_ids=ids).logits
        torch.testing.assert_close(put_behind_interface(model)(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
