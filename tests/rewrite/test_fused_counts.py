"""How many norms, rotations and attentions are fused in the families of the samples: an upgrade of transformers or torch that
exports them otherwise must not switch a fusion off unseen."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rq_compile.architectures.model import Model
from rq_compile.export.export import Exported
from rq_compile.rewrite.attention import attention
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.rewrite import imported
from rq_compile.rewrite.rms_norms import rms_norms
from rq_compile.rewrite.rotary_embeddings import rotary_embeddings

FUSED = {
    "olmoe": {"norms fused": 9, "rotations fused": 4, "attentions fused": 2},
    "qwen2_moe": {"norms fused": 7, "rotations fused": 6, "attentions fused": 3},
    "deepseek_v2": {
        "norms fused": 13,
        "rotations fused": 0,  # of interleaved pairs
        "attentions fused": 0,
        "attentions not fused: heads of 16 have values of 8": 3,
    },
    "gpt_oss": {"norms fused": 5, "rotations fused": 0, "attentions fused": 0},  # attention with sinks
}


@pytest.mark.parametrize("family", FUSED)
def test_counts(family: str, tiny_checkpoint: Callable[[str], Path], export_once: Callable[[Model], Exported]) -> None:
    graph = imported(export_once(Model.open(tiny_checkpoint(family))).model)
    assert counts_of(run(graph) for run in (rms_norms, rotary_embeddings, attention)) == FUSED[family]
