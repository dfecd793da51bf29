"""How many tokens are enough to measure what rounding changes of attention, shared experts, dense FFNs and the head?

    python benchmarks/sampled_rows.py --sample deepseek-v2

calibrates a trained sample model on 16,384 tokens of the sample texts, in batches of 8 sequences of 256, with all tokens sampled
and with several numbers of them (``SAMPLED_ROWS``, of at most ``SAMPLED_BATCHES`` batches). For every kind of module, it prints
by which factor the relative change differs from that on all tokens: of the median and of the worst module, in int8 and int4.
"""

import argparse
from pathlib import Path

import numpy as np

from rq_compile.architectures.model import Model
from rq_compile.calibration import dense
from rq_compile.calibration.calibrate import calibrate

ROOT = Path(__file__).parents[1]
TOKENS, LENGTH, BATCH = 16384, 256, 8
ALL = 1 << 30


def changes(model: Model, texts: dict[str, str], rows: int, batches: int) -> dict[tuple[str, str, str], float]:
    """The relative change by kind, name and format."""
    dense.SAMPLED_ROWS, dense.SAMPLED_BATCHES = rows, batches
    found, _ = calibrate(
        model, texts, tokens=TOKENS, batch_size=BATCH, sequence_length=LENGTH, formats=("int8",), progress=lambda *_: None
    )
    return {
        (module.kind, module.name, format): error / module.square
        for module in found.dense
        for format, error in module.error.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", default="deepseek-v2")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--batches", type=int, default=dense.SAMPLED_BATCHES)
    given = parser.parse_args()
    model = Model.open(ROOT / "samples" / given.sample)
    texts = {path.stem: path.read_text() for path in sorted((ROOT / "samples" / "text").glob("*.txt"))}
    expected = changes(model, texts, ALL, ALL)
    for rows in given.rows:
        found = changes(model, texts, rows, given.batches)
        for kind in dict.fromkeys(key[0] for key in expected if key[0] != "embedding"):
            logs = [abs(np.log(found[key] / value)) for key, value in expected.items() if key[0] == kind]
            print(f"{given.sample}, {rows} tokens, {kind}: median {np.exp(np.median(logs)):.2f}, worst {np.exp(max(logs)):.2f}")


if __name__ == "__main__":
    main()
