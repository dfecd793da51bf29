"""Logits of only the last tokens, and prompts that run in pieces."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import Result
from command_line import python

from rq_compile.runtime.engine import Engine
from rq_compile.targets.vocabulary import _rotates_by_length

Command = Callable[..., Result]


@pytest.mark.parametrize("kept", [1, 3, 9, 40, 0])
def test_logits_of_the_last_tokens_are_the_last_of_all(stages: Path, kept: int) -> None:
    engine = Engine.load(stages / "model.onnx", threads=1)
    ids = np.random.default_rng(kept).integers(4, 99, (3, 9))
    feeds = engine._accepted(engine._session, engine._feeds(ids, None, None)) | {"logits_to_keep": np.array([kept])}
    some, every = engine._session.run(["logits"], feeds)[0], engine.logits(ids)
    np.testing.assert_array_equal(some, every[:, -kept:] if kept else every)
    del feeds["logits_to_keep"]
    np.testing.assert_array_equal(engine._session.run(["logits"], feeds)[0], every[:, -1:])


@pytest.mark.parametrize("chunk", [1, 2, 7, 30, 31, 512, None])
def test_a_prompt_in_pieces_is_continued_alike(stages: Path, chunk: int | None) -> None:
    engine = Engine.load(stages / "model.onnx", threads=1)
    assert engine.manifest.prefill_chunk == 512
    prompt = np.random.default_rng(0).integers(4, 99, 31).tolist()
    whole, pieces = (Engine(engine.path, engine.manifest.model_copy(update={"prefill_chunk": size}), 1) for size in (None, chunk))
    assert list(pieces.generate(prompt, 12, stop=False)) == list(whole.generate(prompt, 12, stop=False))


def test_rotations_that_follow_the_length_take_prompts_whole() -> None:

    for parameters, by_length in (
        ({"rope_type": "default", "rope_theta": 1e4}, False),
        ({"rope_type": "yarn", "factor": 4.0}, False),
        ({"rope_type": "dynamic", "factor": 4.0}, True),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}, True),
        (None, False),
    ):
        model: Any = SimpleNamespace(text_config=SimpleNamespace(rope_parameters=parameters))
        assert _rotates_by_length(model) == by_length


LONG_PROMPT = """
import re, sys
from pathlib import Path
from rq_compile.runtime.engine import Engine

engine = Engine.load(Path(sys.argv[1]), threads=1)
(token,) = engine.generate([4 + place % 90 for place in range(32_768)], 1, stop=False)
print(token, re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not say how much memory a process had")
def test_a_prompt_of_32k_tokens_takes_little_memory_with_a_large_vocabulary(tmp_path: Path, rq_compile: Command) -> None:
    """Logits of all tokens would take 20 GB, and the attention scores of a layer 17 GB. In one piece, it takes 1.3 GB."""
    vocabulary = 151_936
    model = tiny.build("olmoe", tmp_path / "model", vocab_size=vocabulary, max_position_embeddings=32_768 + 1)
    plan, path = tmp_path / "plan.json", tmp_path / "model.onnx"
    for arguments in (["plan", str(model), "--data-free", "-o", str(plan)], [str(model), "--plan", str(plan), "-o", str(path)]):
        result = rq_compile(*arguments)
        assert result.exit_code == 0, result.output
    process = python("-c", LONG_PROMPT, str(path))
    output, error = process.communicate()
    assert process.returncode == 0, error
    token, kilobytes = map(int, output.split())
    assert 0 <= token < vocabulary
    assert kilobytes < 400_000  # 150,000 on x86-64
