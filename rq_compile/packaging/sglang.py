"""SGLang: the file of ``--init-expert-location``.

``ExpertLocationMetadata.init_by_mapping`` (``sglang/srt/eplb/expert_location.py``) indexes ``physical_to_logical_map`` by decoder
layer. Newer versions require a row for each of them, so dense layers get rows too, which are not used.
"""

import json
import shlex
from pathlib import Path

import numpy as np

from rq_compile.errors import UserError
from rq_compile.files import folder_written_beside
from rq_compile.packaging.package import Package
from rq_compile.packaging.placements import read_placement

FILE = "expert_location.json"


def package(source: Path, output: Path, layers: int | None = None, extra_layers: int = 0) -> Package:
    """``layers``: number of decoder layers of the model, including dense ones; None means up to the last one with experts.
    ``extra_layers`` follow them, see ``read_placement``.

    Raises:
        UserError: ``layers`` does not reach the last layer with experts; see also ``read_placement`` and
            ``folder_written_beside``.
    """
    placement = read_placement(source, extra_layers, layers)
    least = placement.index[-1 - extra_layers] + 1
    if layers is not None and layers < least:
        raise UserError(f"--layers {layers} is too few: {source} places experts in layer {least - 1}; give {least} or more", 2)
    dense = (np.arange(placement.slots) % placement.experts_of_model).tolist()
    known = dict(zip(placement.index, placement.by_layer(), strict=True))
    rows = [known.get(layer, dense) for layer in range((layers or least) + extra_layers)]
    with folder_written_beside(output) as folder:
        (folder / FILE).write_text(json.dumps({"physical_to_logical_map": rows}) + "\n", encoding="utf-8")
    ranks = str(placement.ranks)
    serve = ["python", "-m", "sglang.launch_server", "--model-path", placement.model, "--tp-size", ranks, "--ep-size", ranks]
    serve += ["--ep-num-redundant-experts", str(placement.redundant), "--init-expert-location", str(output / FILE)]
    end = [] if layers else [f"rows end with layer {least - 1}, the last with experts; if dense layers follow, give --layers"]
    return Package(
        destination="sglang",
        folder=str(output),
        files=[FILE],
        run=[shlex.join(serve)],
        remarks=[*placement.remarks, *end],
    )
