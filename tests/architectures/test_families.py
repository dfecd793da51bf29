"""Every family from checkpoint to engine, against transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import alone_and_together
import fused_counts
import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from plans import format_of, plan_of, replicated_and_quantized, tokens, unchanged

from rq_compile.architectures.load import load_model
from rq_compile.architectures.model import Model
from rq_compile.export.export import export_graph
from rq_compile.export.exported import Exported
from rq_compile.quantization.quantizer import stored
from rq_compile.runtime.engine import Engine
from rq_compile.runtime.reference import Reference
from rq_compile.targets import onnxruntime as target

LOWERINGS = ("native", "stock", "batched")


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Model:
    return Model.open(tiny_checkpoint(request.param))


@pytest.fixture(scope="module")
def exported(checkpoint: Model) -> Iterator[Exported]:
    """The family's graph, exported only once, since exporting takes most of the time."""
    graph = export_graph(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "export_graph", lambda _: graph)
        yield graph


@pytest.fixture(scope="module")
def reference(checkpoint: Model) -> Reference:
    return Reference.load(checkpoint)


def decoder_tokens(model: Reference | Engine, batch: int) -> dict[str, np.ndarray]:
    return {"decoder_input_ids": tokens(batch, 6, seed=9)} if model.encoder_decoder else {}


def quantized_in_place(checkpoint: Model) -> Reference:
    """The transformers model, with the experts' weights rounded to the plan's formats."""
    model = load_model(checkpoint)
    for layer in checkpoint.layers:
        module: Any = model.get_submodule(layer.name)
        for expert in range(layer.geometry.experts):
            if isinstance(module, torch.nn.ModuleDict):
                dense: Any = module[f"expert_{expert}"]
                weights = [dense.wi.weight, dense.wo.weight]
            else:
                weights = [module.gate_up_proj[expert], module.down_proj[expert]]
            for weight in weights:
                # GPT-OSS keeps its experts [in, out].
                canonical = weight.T if checkpoint.model_type == "gpt_oss" else weight
                canonical.copy_(torch.from_numpy(stored(canonical.numpy(), format_of(expert))))
    return Reference(model)


def test_the_graph_has_one_experts_node_per_layer_and_no_weights(checkpoint: Model, exported: Exported) -> None:
    nodes = {
        attribute.s.decode() for node in exported.model.graph.node if node.op_type == "Experts" for attribute in node.attribute
    }
    assert nodes == {layer.name for layer in checkpoint.layers}
    assert not any(name.startswith(layer) for name in exported.parameters for layer in nodes)
    for value in [value for value in exported.model.graph.input if value.name != "logits_to_keep"]:
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch", value.name


def test_no_fusion_is_switched_off_unseen(checkpoint: Model, exported: Exported) -> None:
    assert fused_counts.counted(exported.model) == fused_counts.FAMILIES[checkpoint.path.name]


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_plan_that_changes_nothing_changes_no_logit(
    checkpoint: Model, exported: Exported, reference: Reference, lowering: str, tmp_path: Path
) -> None:
    target.compile_engine(checkpoint, plan_of(checkpoint, unchanged), tmp_path / "model.onnx", lowering)
    engine = Engine.load(tmp_path / "model.onnx", threads=1)
    for batch, length in ((1, 1), (2, 9), (3, 30)):
        ids = tokens(batch, length)
        decoder = decoder_tokens(engine, batch)
        np.testing.assert_allclose(engine.logits(ids, **decoder), reference.logits(ids, **decoder), atol=1e-4, rtol=0)
    prompt = tokens(7).tolist()
    assert list(engine.generate(prompt, 12, stop=False)) == list(reference.generate(prompt, 12, stop=False))
    if lowering == "native" and not engine.encoder_decoder:
        alone_and_together.check(engine)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_padding_is_masked(checkpoint: Model, exported: Exported, reference: Reference, lowering: str, tmp_path: Path) -> None:
    target.compile_engine(checkpoint, plan_of(checkpoint, unchanged), tmp_path / "model.onnx", lowering)
    engine = Engine.load(tmp_path / "model.onnx", threads=1)
    ids, mask = tokens(2, 9), np.ones((2, 9), np.int64)
    mask[1, 5:] = 0
    decoder = decoder_tokens(engine, 2)
    ours, theirs = engine.logits(ids, mask, **decoder), reference.logits(ids, mask, **decoder)
    seen = np.ones(ours.shape[:2], bool) if decoder else mask.astype(bool)
    np.testing.assert_allclose(ours[seen], theirs[seen], atol=1e-4, rtol=0)


def test_replicated_and_quantized(checkpoint: Model, exported: Exported, tmp_path: Path) -> None:
    expected = quantized_in_place(checkpoint)
    plan = plan_of(checkpoint, replicated_and_quantized)
    ids = tokens(2, 24)
    for lowering in LOWERINGS:
        target.compile_engine(checkpoint, plan, tmp_path / f"{lowering}.onnx", lowering)
        engine = Engine.load(tmp_path / f"{lowering}.onnx", threads=1)
        decoder = decoder_tokens(engine, 2)
        logits, rows = engine.counted_logits(ids, **decoder)
        np.testing.assert_allclose(logits, expected.logits(ids, **decoder), atol=1e-4, rtol=0)
        for layer in plan.layers:
            fed = ids if "decoder" not in layer.name else decoder["decoder_input_ids"]
            assert rows[layer.name].sum() == fed.size * layer.geometry.top_k
            for expert in range(layer.geometry.experts):
                copies = [rows[layer.name][s] for s, slot in enumerate(layer.slots) if slot.expert == expert]
                assert max(copies) - min(copies) <= 1


@pytest.mark.parametrize("lowering", ["stock", "batched"])
def test_an_engine_that_needs_no_op_library(checkpoint: Model, exported: Exported, lowering: str, tmp_path: Path) -> None:
    target.compile_engine(checkpoint, plan_of(checkpoint, replicated_and_quantized), tmp_path / "model.onnx", lowering)
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
