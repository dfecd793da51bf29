"""KTransformers in SGLang: how often each expert is chosen, so that the busiest are kept on the GPU and the others on the CPU.

With ``--kt-expert-placement-strategy frequency``, the file of ``--init-expert-location`` has ``logical_count [steps, layers,
m]``, as SGLang's recorder dumps it (``.pt``), with a row for every decoder layer. Its own balancer (``init_by_eplb`` in
``sglang/srt/eplb/expert_location.py``) reads the same file.
"""

import shlex
from pathlib import Path

import numpy as np

from rq_compile.errors import UserError
from rq_compile.files import folder_written_beside
from rq_compile.packaging.package import Package
from rq_compile.packaging.placements import loads_of, one_number_of_experts, read_plan
from rq_compile.planning.schema import Plan

FILE = "expert_counts.pt"
# A plan has shares of a layer's tokens; counts are these shares of as many pairs.
PAIRS = 1 << 24
PARTS = (8, 4, 2)  # of the experts on the GPU, in the remark


def package(source: Path, output: Path, layers: int | None = None) -> Package:
    """``layers``: number of decoder layers of the model, including dense ones; None means up to the last one with experts.

    Raises:
        UserError: the plan has no loads, or its loads do not differ; ``layers`` is too few; see also ``read_plan`` and
            ``folder_written_beside``.
    """
    import torch

    plan = read_plan(source)
    experts = one_number_of_experts(plan, str(source))
    _check_loads(plan, source)
    least = max(layer.index for layer in plan.layers) + 1
    if layers is not None and layers < least:
        raise UserError(f"--layers {layers} is too few: {source} has experts in layer {least - 1}; give {least} or more", 2)
    counts = np.zeros((1, layers or least, experts), np.int64)
    for layer in plan.layers:
        counts[0, layer.index] = np.round(PAIRS * loads_of(layer))
    with folder_written_beside(output) as folder:
        torch.save({"logical_count": torch.from_numpy(counts)}, folder / FILE)
    on_gpu = max(1, experts // 4)
    serve = ["python", "-m", "sglang.launch_server", "--model-path", plan.model, "--kt-weight-path", plan.model]
    serve += ["--kt-num-gpu-experts", str(on_gpu), "--kt-expert-placement-strategy", "frequency"]
    serve += ["--init-expert-location", str(output / FILE)]
    end = [] if layers else [f"rows end with layer {least - 1}, the last with experts; if dense layers follow, give --layers"]
    return Package(
        destination="ktransformers",
        folder=str(output),
        files=[FILE],
        run=[shlex.join(serve)],
        remarks=[_kept(counts, experts, on_gpu), *_losses(plan), *end],
    )


def _check_loads(plan: Plan, source: Path) -> None:
    """
    Raises:
        UserError: a layer's loads are not known, or all are equal.
    """
    for layer in plan.layers:
        if any(slot.load is None for slot in layer.slots):
            raise UserError(
                f"{source} has no loads for layer {layer.index}, but the file counts tokens; plan from a calibration", 2
            )
    if all(np.ptp(loads_of(layer)) < 1 / PAIRS for layer in plan.layers):
        raise UserError(
            f"all experts of {source} have the same load, so none belongs on the GPU; calibrate on text and plan again", 2
        )


def _kept(counts: np.ndarray, experts: int, on_gpu: int) -> str:
    """The share of the rows that the GPU computes with several numbers of experts on it."""
    busiest = -np.sort(-counts[0], axis=1)

    def share(number: int) -> str:
        return f"{100 * busiest[:, :number].sum() / max(1, counts.sum()):.0f} % with {number}"

    numbers = dict.fromkeys(max(1, experts // part) for part in PARTS)
    return (
        f"of the tokens' choices, the GPU computes {', '.join(map(share, numbers))} experts of a layer on it, on the calibration "
        f"text; the command keeps {on_gpu}, change --kt-num-gpu-experts to fit the GPU's memory"
    )


def _losses(plan: Plan) -> list[str]:
    replicas = sum(len(layer.slots) - layer.geometry.experts for layer in plan.layers)
    said = [
        "the file has only counts: formats are those of the server (--kt-method, and --kt-weight-path for weights on the CPU)"
    ]
    if replicas:
        said.append(f"{replicas} replicas are left out, because the GPU and the CPU share no expert")
    if plan.ranks > 1:
        said.append(f"the {plan.ranks} ranks are left out")
    return said
