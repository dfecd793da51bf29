"""transformers' internals that rq-compile uses are where it expects them.

transformers does not guarantee them, and pyproject.toml allows many versions of it. If a version lacks such a name, these tests
show which name is missing, and which file uses it.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

import rq_compile

PACKAGE = Path(rq_compile.__file__).parent
MODELS = "transformers.models"
# Attributes and parameters that are used by name, and the methods that are replaced while a model is traced.
ATTRIBUTES = {
    "transformers.exporters.exporter_onnx": ("OnnxExporter.export", "_ONNX_TRANSLATION_TABLE"),
    "transformers.integrations.moe": ("ALL_EXPERTS_FUNCTIONS.get_interface", "ALL_EXPERTS_FUNCTIONS.register"),
    "transformers": ("PretrainedConfig._decode_special_floats", "PreTrainedModel._from_config", "PreTrainedModel.get_decoder"),
    "transformers.cache_utils": ("DynamicLayer.lazy_initialization", "Cache.get_recurrent_state"),
    "torch.fx.experimental._config": ("meta_nonzero_assume_all_nonzero",),
    f"{MODELS}.glm5_next.modeling_glm5_next": ("Glm5NextTextIndexer.get_pooled_states",),
    f"{MODELS}.jamba.modeling_jamba": ("JambaMambaMixer.forward", "mamba_selective_scan"),
    f"{MODELS}.llama4.modeling_llama4": ("Llama4TextExperts.forward", "Llama4TextMoe.forward", "Llama4TextRotaryEmbedding"),
    f"{MODELS}.minimax.modeling_minimax": ("MiniMaxLightningAttention.forward", "MiniMaxCache.get_linear_cache"),
    f"{MODELS}.phimoe.modeling_phimoe": ("PhimoeRotaryEmbedding.forward.__wrapped__",),
    f"{MODELS}.qwen3_next.modeling_qwen3_next": ("torch_chunk_gated_delta_rule",),
    f"{MODELS}.granitemoehybrid.modeling_granitemoehybrid": ("mamba2_chunk_scan",),
    f"{MODELS}.step3p7.modeling_step3p7": ("Step3p7Experts.forward", "Step3p7Experts._apply_gate"),
}


def imported() -> Iterator[tuple[str, str, str]]:
    """Module, name and importing file of everything that rq-compile imports from inside transformers."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
                for alias in node.names:
                    yield node.module or "", alias.name, str(file.relative_to(PACKAGE.parent))


def used() -> list[tuple[str, str, str]]:
    by_name = [(module, name, "rq_compile, by name") for module, names in ATTRIBUTES.items() for name in names]
    return sorted({(module, name): (module, name, file) for module, name, file in [*imported(), *by_name]}.values())


@pytest.mark.quick
@pytest.mark.parametrize(
    ("module", "name", "file"), used(), ids=lambda value: value if "." not in value else value.rpartition(".")[2]
)
def test_a_name_of_transformers_that_is_used_is_there(module: str, name: str, file: str) -> None:
    missing = f"transformers {transformers.__version__} has no {module}.{name}, which {file} uses: adapt it, or bound the version"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        if module.startswith(MODELS) and file == "rq_compile, by name":
            pytest.skip(f"transformers {transformers.__version__} does not have this family yet")
        pytest.fail(missing)
    for part in name.split("."):
        assert hasattr(found, part), missing
        found = getattr(found, part)


@pytest.mark.quick
def test_the_loader_takes_a_state_dict_without_a_folder() -> None:
    parameters = inspect.signature(transformers.PreTrainedModel.from_pretrained).parameters
    assert "pretrained_model_name_or_path" in parameters, f"transformers {transformers.__version__} loads models in another way"


@pytest.mark.quick
def test_experts_modules_have_the_flags_that_are_read() -> None:
    """The attributes that transformers' decorator of experts adds to a module."""
    from rq_compile.architectures.sources.experts import FLAGS

    module = importlib.import_module(f"{MODELS}.qwen3_moe.modeling_qwen3_moe")
    experts = module.Qwen3MoeExperts(transformers.Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=8, num_experts=2))
    missing = [flag for flag in FLAGS if not hasattr(experts, flag)]
    assert not missing, f"transformers {transformers.__version__}: experts modules have no {', '.join(missing)}"
