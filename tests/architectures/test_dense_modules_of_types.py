"""Non-expert modules lie where calibration runs them, also in model types that nest a language model in another way."""

from pathlib import Path

import model_types
import pytest

from rq_compile.architectures.dense_modules import dense_modules
from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.architectures.traced import text_body


@pytest.mark.parametrize("model_type", ["llama4", "llama4_text", "ernie4_5_vl_moe", "qwen3_vl_moe"])
def test_matrices_lie_in_what_is_run_and_the_body_has_no_head(model_type: str, tmp_path: Path) -> None:
    model = Model.open(model_types.build(model_type, tmp_path / model_type))
    for module in dense_modules(model):
        assert all(name.startswith(f"{module.run}.") for name in module.matrices)
    assert text_body(load_model(model)).get_output_embeddings() is None
