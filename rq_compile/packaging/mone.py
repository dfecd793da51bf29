"""``mone`` (Mixture of Novice Experts): experts that constant vectors replace, as a fork of vLLM reads them from a checkpoint.

The entry ``mone`` of config.json lists these experts by decoder layer; ``approximate_experts`` is its older form. The checkpoint
has a tensor ``<experts module>.<expert>.approx_value [hidden]`` for each, instead of matrices. The router and the gates stay.
The form says nothing of formats, replicas or ranks.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from rq_compile.calibration.statistics import Statistics
from rq_compile.errors import UserError
from rq_compile.files import folder_written_beside
from rq_compile.packaging.package import Package
from rq_compile.packaging.placements import read_plan
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import FLOAT_FORMATS

FILE, VECTORS = "mone.json", "mone.safetensors"


def package(source: Path, output: Path) -> Package:
    """
    Raises:
        UserError: no expert is constant, or the form would lose something; see also ``read_plan``, ``Statistics.beside`` and
            ``folder_written_beside``.
    """
    plan = read_plan(source)
    _check_fits(plan, source)
    statistics = _statistics(plan, source)
    listed = {str(layer.index): sorted(layer.constant_experts) for layer in plan.layers if layer.constant_experts}
    entries = {
        "mone": {"version": 1, "replacement_type": "constant", "experts_by_layer": listed},
        "approximate_experts": listed,
    }
    vectors = {
        f"{layer.name}.{expert}.approx_value": statistics.mean_output(layer.name, expert).astype(np.float32)
        for layer in plan.layers
        for expert in layer.constant_experts
    }
    with folder_written_beside(output) as folder:
        (folder / FILE).write_text(json.dumps(entries) + "\n", encoding="utf-8")
        save_file(vectors, folder / VECTORS, metadata={"format": "pt"})
    said = [
        f"copy the entries of {FILE} into the checkpoint's config.json (approximate_experts only for readers that do not know "
        f"mone), and add the tensors of {VECTORS} to its shards in place of the matrices of these {len(vectors)} experts",
        f"tensors are named by transformers' modules ({next(iter(vectors))}); rename them if the checkpoint has other names",
    ]
    if plan.ranks > 1:
        said.append(f"the {plan.ranks} ranks are left out")
    return Package(destination="mone", folder=str(output), files=[FILE, VECTORS], run=[], remarks=said)


def _check_fits(plan: Plan, source: Path) -> None:
    """
    Raises:
        UserError: see ``package``.
    """
    if not any(layer.constant_experts for layer in plan.layers):
        raise UserError(
            f"{source} has no experts in constant, which is all that mone says; calibrate with constant among --formats and plan "
            "with less --memory",
            2,
        )
    replicas = sum(len(layer.slots) - layer.geometry.experts for layer in plan.layers)
    if replicas:
        raise UserError(f"{source} has {replicas} replicas, which mone would lose; plan for one rank with --target cpu", 2)
    computed = [slot.format for layer in plan.layers for slot in layer.slots if slot.computed]
    lost = Counter(format for format in computed if format not in FLOAT_FORMATS)
    if lost:
        mix = ", ".join(f"{count} in {format}" for format, count in sorted(lost.items()))
        raise UserError(
            f"{source} has rounded experts ({mix}), whose formats mone would lose; plan with --option formats=bf16,constant, or "
            "with the checkpoint's format instead of bf16",
            2,
        )


def _statistics(plan: Plan, source: Path) -> Statistics:
    """
    Raises:
        UserError: the plan's statistics are missing, or have no mean outputs.
    """
    found = Statistics.beside(source.parent, plan.statistics) if plan.statistics else None
    if found is None or not all(found.has_outputs(layer.name) for layer in plan.layers if layer.constant_experts):
        raise UserError(
            f"{source} has no mean outputs of its constant experts; calibrate with constant among --formats and plan again", 2
        )
    return found
