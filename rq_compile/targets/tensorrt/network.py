"""The network for a builder: a checkpoint's graph rewritten by a plan, in ops that TensorRT's parser supports and keeps
packed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from rq_compile.architectures.model import Model
from rq_compile.calibration.statistics import Statistics
from rq_compile.export.exported import Exported
from rq_compile.lowerings import Lowering
from rq_compile.planning.schema import Plan
from rq_compile.rewrite.batched_experts import ExpectedCapacity
from rq_compile.rewrite.halves import HALVES
from rq_compile.rewrite.logits_to_keep import fixed
from rq_compile.rewrite.report import counts_of
from rq_compile.rewrite.rewrite import exported as as_onnx
from rq_compile.rewrite.rewrite import imported
from rq_compile.standalone.decoding import LAST
from rq_compile.targets.streamed import StreamedExpert, dense_weights
from rq_compile.targets.tensorrt.half_precision import half_precision, router_nodes
from rq_compile.targets.tensorrt.narrow import Version, in_versions
from rq_compile.targets.tensorrt.profiles import Profile
from rq_compile.targets.weights_file import Progress, WeightsFile, locate, write_weights

Precision = Literal["fp16", "bf16"]
TENSOR_CORE_ROWS = 16
FP16_MOST = 65504


def default_precision(model: Model) -> Precision:
    """bf16, unless all weights are stored in fp16 or fp32: a model trained in bf16 may compute values beyond fp16's range."""
    stored = {model.checkpoint.dtype_of(name) for name in model.used}
    return "fp16" if stored <= {np.dtype(np.float16), np.dtype(np.float32)} else "bf16"


def remark_on_precision(model: Model, precision: Precision) -> str | None:
    """A sentence about values that fp16 cannot hold but the checkpoint's format can, or None."""
    if precision == "bf16" or model.dtype == "fp16":
        return None
    stored = "bf16" if default_precision(model) == "bf16" else "fp32"
    return (
        f"the checkpoint is stored in {stored} and the network computes in fp16: if a hidden state exceeds {FP16_MOST}, "
        "answers are undefined; --precision bf16 has the range"
    )


@dataclass(frozen=True)
class Network:
    """``model`` as written, without its weights; ``replaced`` counts the replacements, by reason."""

    model: onnx.ModelProto
    weights: WeightsFile
    replaced: dict[str, int]


def write_network(
    model: Model,
    plan: Plan,
    exported: Exported,
    lowering: Lowering,
    path: Path,
    *,
    precision: Precision = "fp16",
    statistics: Statistics | None = None,
    outputs: Statistics | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Network:
    """Write ``path`` (ONNX) and its weights ``path.data``. In ONNX Runtime, the network computes the engine's intended results.

    Logits are those of the last token of each sequence. ``lowering`` is one of ``TENSORRT_LOWERINGS``; ONNX Runtime does not have
    the node of ``Plugins`` on the CPU.
    ``statistics``: those of the calibration, used to round int4 slots; ``outputs``: see ``mean_outputs_for``. Weights are
    streamed, as in ``compile_engine``.

    Raises:
        UserError: the plan does not fit, or ``precision`` cannot hold a weight.
    """
    layers = {layer.name: layer for layer in model.layers}
    source = lambda layer, expert: StreamedExpert(model, layers[layer], expert, statistics, outputs)  # noqa: E731
    graph = imported(exported.model)
    router, last = router_nodes(graph), fixed(graph, LAST)
    lowered = lowering.lower(as_onnx(graph), plan, source)
    typed, versions, halved = half_precision(lowered.model, HALVES[precision], router=router, layers=list(layers))
    dense, aliases, _ = dense_weights(model, lowered.model.graph, exported.parameters)
    merged, same = _merged(versions, aliases)
    sections = [in_versions(section, merged) for section in (*dense, *lowered.experts)]
    data = Path(f"{path}.data")
    with data.open("wb") as file:
        written = write_weights(sections, file, progress, threads=threads, memory=model.largest_layer_bytes)
    locate(typed, written.starts | {name: written.starts[other] for name, other in same.items()}, data.name)
    path.write_bytes(typed.SerializeToString(deterministic=True))
    replaced = lowered.replaced | {"equal tensors written once": len(same)}
    passes = counts_of([last, *lowered.reports, halved])
    return Network(typed, written, passes | {reason: count for reason, count in replaced.items() if count})


def expected_capacity(profiles: Sequence[Profile]) -> ExpectedCapacity:
    """The capacity of the lanes. Decoding, a profile of one token per sequence, never needs more than one pass."""
    decoding = [profile.most_tokens for profile in profiles if profile.sequence.most == 1]
    return ExpectedCapacity(least=max([TENSOR_CORE_ROWS, *decoding]), most=max(profile.most_tokens for profile in profiles))


def _merged(
    versions: Mapping[str, Sequence[Version]], aliases: Mapping[str, str]
) -> tuple[dict[str, list[Version]], dict[str, str]]:
    """The versions of weights to write, and, for each weight that equals another, the name of the version that is written."""
    merged = {name: list(found) for name, found in versions.items() if name not in aliases}
    same: dict[str, str] = {}
    for alias, name in aliases.items():
        for version in versions.get(alias, ()):
            held = merged.setdefault(name, [])
            equal = [other for other in held if other.dtype == version.dtype]
            if not equal:
                held.append(version)
            elif equal[0].name != version.name:
                same[version.name] = equal[0].name
    return merged, same
