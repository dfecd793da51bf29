"""TensorRT-LLM: an options file whose load balancer starts from the placement and keeps it.

The format is ``MoeLoadBalancerConfig`` of ``tensorrt_llm``, as ``examples/wide_ep`` of its repository documents it: layers by
their number in the model, slots in consecutive blocks of ``num_slots / ep_size`` a rank, 0 layer updates.
"""

from pathlib import Path

import yaml

from rq_compile.files import folder_written_beside
from rq_compile.packaging.package import Package
from rq_compile.packaging.placements import read_placement

FILE = "llm_api_options.yaml"


def package(source: Path, output: Path) -> Package:
    """
    Raises:
        UserError: see ``read_placement`` and ``folder_written_beside``.
    """
    placement = read_placement(source)
    balancer = {
        "num_slots": placement.slots,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": dict(zip(placement.index, placement.by_layer(), strict=True)),
    }
    with folder_written_beside(output) as folder:
        options = {"moe_config": {"load_balancer": balancer}}
        (folder / FILE).write_text(yaml.safe_dump(options, sort_keys=False, default_flow_style=None, width=2**20))
    serve = f"trtllm-serve {placement.model} --tp_size {placement.ranks} --ep_size {placement.ranks}"
    return Package(
        destination="tensorrt-llm",
        folder=str(output),
        files=[FILE],
        run=[f"{serve} --extra_llm_api_options {output / FILE}"],
        remarks=placement.remarks,
    )
