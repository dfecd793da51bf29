"""vLLM: the placement as a list of rows, one for each MoE layer.

vLLM does not read placement files yet. The format is that of a proposal (vllm-project/vllm #49572), whose rows leave out dense
layers, like vLLM's own maps. Today, its balancer accepts only the number of redundant experts.
"""

import json
import shlex
from pathlib import Path

from rq_compile.files import folder_written_beside
from rq_compile.packaging.package import Package
from rq_compile.packaging.placements import read_placement

FILE = "physical_to_logical_map.json"


def package(source: Path, output: Path, extra_layers: int = 0) -> Package:
    """``extra_layers``: see ``read_placement``.

    Raises:
        UserError: see ``read_placement`` and ``folder_written_beside``.
    """
    placement = read_placement(source, extra_layers)
    with folder_written_beside(output) as folder:
        (folder / FILE).write_text(json.dumps(placement.by_layer()) + "\n", encoding="utf-8")
    serve = ["vllm", "serve", placement.model, "--tensor-parallel-size", str(placement.ranks), "--enable-expert-parallel"]
    serve += ["--enable-eplb", "--eplb-config", json.dumps({"num_redundant_experts": placement.redundant})]
    return Package(
        destination="vllm",
        folder=str(output),
        files=[FILE],
        run=[shlex.join(serve)],
        remarks=[
            *placement.remarks,
            f"vLLM does not read placement files yet: the command gives its balancer the same number of slots, and {FILE} has "
            "the format of its proposal #49572",
        ],
    )
