"""How many norms, rotations and attentions are fused in every tiny checkpoint, and how many are left, with the reason.

An upgrade of transformers or torch that exports them otherwise must not switch a fusion off unseen. Where a count changes with
such an upgrade, look at the graph first: a pattern that is written otherwise wants another match.
"""

import numpy as np
import onnx

from rq_compile.rewrite.attention import attention
from rq_compile.rewrite.dense_gemms import DenseWeights
from rq_compile.rewrite.latent_attention import latent_attention
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.rewrite import imported
from rq_compile.rewrite.rms_norms import rms_norms
from rq_compile.rewrite.rotary_embeddings import rotary_embeddings


def counted(exported: onnx.ModelProto) -> dict[str, int]:
    """What the four passes count in a graph as it is exported."""
    graph = imported(exported)
    _, latent = latent_attention(graph, "stored", DenseWeights(lambda _: np.dtype(np.float32), lambda _: np.zeros(0)))
    return counts_of([latent, *(run(graph) for run in (rms_norms, rotary_embeddings, attention))])


def fused(norms: int, rotations: int, attentions: int, left: dict[str, int] | None = None, *, latent: int = 0) -> dict[str, int]:
    """``left``: "attentions: the reason"."""
    counts = {"norms fused": norms, "rotations fused": rotations, "attentions fused": attentions}
    counts["latent attentions fused"] = latent
    return counts | {why.replace(": ", " not fused: ", 1): count for why, count in (left or {}).items()}


# By the name of the checkpoint in tiny.py.
FAMILIES = {
    "olmoe": fused(9, 4, 2),
    "mixtral": fused(5, 4, 2),
    "qwen2_moe": fused(7, 6, 3),
    "qwen3_moe": fused(9, 4, 2),
    "phimoe": fused(0, 4, 2),
    "deepseek_v2": fused(13, 0, 0, latent=3),
    "deepseek_v3": fused(13, 0, 0, latent=3),
    "gpt_oss": fused(5, 0, 2),
    "granitemoe": fused(5, 4, 2),
    "switch_transformers": fused(12, 0, 0),
    "llama_moe": fused(5, 4, 2),
    "deepseek": fused(7, 6, 3),
}
