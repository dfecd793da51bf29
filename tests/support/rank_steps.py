"""Steps of one rank of an engine, for test_ranks.py: ``rank_steps.py ENGINE GIVEN.npz`` writes ``RANK.npz`` beside GIVEN.

Every rank has its own sequences, or none, and then generates a number of tokens of its own, or nothing.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from rq_compile.runtime.engine import Engine

engine, given = Engine.load(Path(sys.argv[1]), 1), np.load(sys.argv[2])
last = np.cumsum(given["sequences"])[engine.rank]
mine = slice(last - given["sequences"][engine.rank], last)
decoder = {"decoder_input_ids": given["decoder"][mine]} if engine.encoder_decoder else {}
logits, rows = engine.counted_logits(given["ids"][mine], **decoder)
again = engine.logits(given["ids"][mine], **decoder)
made = [] if engine.rank == 1 else list(engine.generate(given["ids"][engine.rank].tolist(), 3 * engine.rank + 2, stop=False))
engine.wait() if engine.rank == 1 else None
named: dict[str, Any] = {f"rows of {layer}": counted for layer, counted in rows.items()}
np.savez(Path(sys.argv[2]).parent / f"{engine.rank}.npz", logits=logits, again=again, made=made, **named)
