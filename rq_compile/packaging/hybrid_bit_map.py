"""``hybrid_bit_map``: the bits of every expert, as a fork of vLLM reads them from the ``quantization_config`` of a checkpoint.

Each decoder layer with experts has a list: 4 stands for the kept format (MXFP4 if ``kept_format`` is ``mxfp4_e8m0k32``), and 3
for the other one. The program that writes such a checkpoint quantizes the weights itself; the map only chooses.
"""

import json
from collections import Counter
from pathlib import Path

from rq_compile.errors import UserError
from rq_compile.files import folder_written_beside
from rq_compile.packaging.package import Package
from rq_compile.packaging.placements import read_plan
from rq_compile.planning.schema import Plan
from rq_compile.quantization.formats import SLOT_FORMATS

FILE = "hybrid_bit_map.json"
BITS = (3, 4)
KEPT = "mxfp4_e8m0k32"


def package(source: Path, output: Path) -> Package:
    """
    Raises:
        UserError: the plan has replicas, or formats of other bits; see also ``read_plan`` and ``folder_written_beside``.
    """
    plan = read_plan(source)
    _check_fits(plan, source)
    rows = {}
    for layer in plan.layers:
        bits = {slot.expert: SLOT_FORMATS[slot.format].bits for slot in layer.slots}
        rows[str(layer.index)] = [bits[expert] for expert in range(layer.geometry.experts)]
    with folder_written_beside(output) as folder:
        (folder / FILE).write_text(json.dumps({"hybrid_bit_map": rows, "kept_format": KEPT}) + "\n", encoding="utf-8")
    formats = ", ".join(sorted({slot.format for layer in plan.layers for slot in layer.slots}))
    said = [
        f"the plan's errors are those of {formats}; the program that writes the checkpoint has its own formats of these bits",
        f"copy the entries of {FILE} into the quantization_config of the checkpoint that it writes",
    ]
    if plan.ranks > 1:
        said.append(f"the {plan.ranks} ranks are left out")
    return Package(destination="hybrid-bit-map", folder=str(output), files=[FILE], run=[], remarks=said)


def _check_fits(plan: Plan, source: Path) -> None:
    """
    Raises:
        UserError: see ``package``.
    """
    replicas = sum(len(layer.slots) - layer.geometry.experts for layer in plan.layers)
    if replicas:
        raise UserError(
            f"{source} has {replicas} replicas, which a hybrid_bit_map would lose; plan for one rank with --target cpu, which "
            "makes none",
            2,
        )
    other = Counter(slot.format for layer in plan.layers for slot in layer.slots if SLOT_FORMATS[slot.format].bits not in BITS)
    if other:
        lost = ", ".join(f"{count} in {format}" for format, count in sorted(other.items()))
        raise UserError(
            f"{source} has experts of other bits than a hybrid_bit_map can say ({lost}; it has 3 and 4); plan with --option "
            "formats=int4",
            2,
        )
