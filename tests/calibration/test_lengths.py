"""How much of a text is run and in which sequences, by default and by option; long texts do not have to fit into memory."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from calibrated import LENGTH, TEXTS, copied, letters
from command_line import run_command as run

from rq_compile.architectures.model import Model
from rq_compile.calibration.calibrate import work_of
from rq_compile.calibration.lengths import TOKENS, batch_size_for, sequence_length_for
from rq_compile.calibration.text import _shares, tokenize
from rq_compile.errors import UserError
from rq_compile.texts import Text, open_texts

Tiny = Callable[[str], Path]


def test_lengths_suit_the_model(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    assert [sequence_length_for(SimpleNamespace(**given)) for given in ({"max_position_embeddings": 131072}, {})] == [2048, 2048]
    assert sequence_length_for(SimpleNamespace(max_position_embeddings=512)) == 512
    assert [batch_size_for(length) for length in (12, 256, 512, 1500, 2048, 100_000)] == [8, 8, 4, 1, 1, 1]
    checkpoint = copied(tiny_checkpoint("olmoe"), tmp_path / "model", max_position_embeddings=40)
    work = work_of(checkpoint, TEXTS)
    assert (work.sequence_length, work.batch_size) == (40, 8)
    assert work.batches[0].decoder.ids.shape == (2, 40)
    assert [
        work_of(checkpoint, TEXTS, batch_size=1).sequence_length,
        work_of(checkpoint, TEXTS, sequence_length=9).batch_size,
    ] == [40, 8]


@pytest.mark.parametrize(
    ("counts", "most", "shares"),
    [
        ([9], 5, [5]),
        ([9, 2, 9], 12, [5, 2, 5]),
        ([3, 3], 100, [3, 3]),
        ([7, 7, 7], 10, [3, 3, 4]),
        ([1, 50, 4, 50], 45, [1, 20, 4, 20]),
    ],
)
def test_texts_share_the_tokens(counts: list[int], most: int, shares: list[int]) -> None:
    assert _shares(counts, most) == shares


def test_the_first_tokens_of_every_text_are_run(tiny_checkpoint: Tiny) -> None:
    checkpoint = Model.open(tiny_checkpoint("olmoe"))
    whole = tokenize(checkpoint, TEXTS)
    assert whole.cut == []
    some = tokenize(checkpoint, TEXTS, 2 * LENGTH)
    assert [ids.tolist() for ids in some.of] == [ids[:LENGTH].tolist() for ids in whole.of]
    assert some.cut == list(TEXTS)
    assert tokenize(checkpoint, TEXTS, sum(map(len, whole.of))).cut == []
    with pytest.raises(
        UserError, match=r"--tokens 3 is too few for 2 texts, of each of which at least 2 are run; give at least 4"
    ):
        tokenize(checkpoint, TEXTS, 3)


@pytest.mark.parametrize(
    ("names", "said"), [(["a.txt"], "the text is"), (["a.txt", "b.txt"], "a.txt is"), (["a.txt", "c.txt"], "2 of 2 texts are")]
)
def test_says_what_was_left_out(tiny_checkpoint: Tiny, tmp_path: Path, names: list[str], said: str) -> None:
    for name, count in (("a.txt", 400), ("b.txt", 5), ("c.txt", 300)):
        (tmp_path / name).write_text(letters(count, 3))
    texts = [part for name in names for part in ("--text", tmp_path / name)]
    given = ["calibrate", tiny_checkpoint("olmoe"), *texts, "--quantizer", "nearest", "--tokens", 100, "-o", tmp_path / "c.json"]
    result = run(*given)
    assert (
        f"{said} longer than what is run of it, from its beginning: 100 tokens in all; --tokens N runs more or fewer"
        in result.stderr
    )
    written = json.loads((tmp_path / "c.json").read_text())
    assert (written["tokens"], written["sequence_length"]) == (100, 256)
    assert "--tokens N runs more" in run(*given, "--dry-run").output


def test_a_default_is_stated_where_a_user_looks() -> None:
    assert f"{TOKENS:,} tokens" in (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()


def test_pipes_are_read_once(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS["first.txt"])
    calibrating = f"-m rq_compile calibrate {tiny_checkpoint('olmoe')} --quantizer nearest -o {tmp_path}/c.json"
    command = f"{sys.executable} -P {calibrating} --text <(cat {tmp_path}/a.txt)"
    subprocess.run(["bash", "-c", command], check=True)
    assert json.loads((tmp_path / "c.json").read_text())["tokens"] == len(TEXTS["first.txt"])


LONG = """
import resource, sys
from pathlib import Path
import numpy as np
from rq_compile.architectures.model import Model
from rq_compile.calibration.text import tokenize
from rq_compile.texts import open_texts
model = Model.open(Path(sys.argv[1]))
model.tokenizer
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = tokenize(model, open_texts([Path(sys.argv[2])]), 1000)
print(len(found.of[0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["long.txt", "long.jsonl"])
def test_long_texts_are_not_held(tiny_checkpoint: Tiny, tmp_path: Path, name: str) -> None:
    line = letters(999, 4)
    row = json.dumps({"text": line}) if name.endswith("l") else line
    with (tmp_path / name).open("w") as file:
        file.writelines([row + "\n"] * 60_000)  # 60 MB
    result = subprocess.run(
        [sys.executable, "-P", "-c", LONG, tiny_checkpoint("olmoe"), tmp_path / name], capture_output=True, text=True, check=True
    )
    tokens, kilobytes = map(int, result.stdout.split())
    assert tokens == 1000
    assert kilobytes < 30_000


def test_a_text_is_read_again_and_again(tmp_path: Path) -> None:
    """Its checksum is that of the whole, by which merging knows it again, however much of it was run."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé\r\nb".encode())
    text = open_texts([path])["a.txt"]
    assert text.read() == text.read() == "é\nb"
    assert text == Text(text.pieces, hashlib.sha256("é\nb".encode()).hexdigest())
    assert Text.of("é\nb").sha256 == text.sha256


def test_refuses_half_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl has '\\ud83d', half of a UTF-16 surrogate pair; correct"):
        open_texts([path])
