"""Messages to the user: those in the source, and those raised by the tests of this session."""

from pathlib import Path

import messages
import pytest
from command_line import Run

from rq_compile.errors import reason

pytestmark = pytest.mark.quick

GOOD = [
    "cannot write /out/plan.json: there is no folder /out; make it or choose another output with -o",
    "no such command or model directory: 'x'; did you mean calibrate?",
    "m.safetensors is truncated: it has 8 bytes, but its header alone needs 90; download it again",
    "expert 3 of layer 2 fits no format; allow more with --option formats",
]
BAD = {
    "the checkpoint is wrong; check it": "names no value",
    "--sm 89 is no list; write for example --sm 80,89": "'is no' for 'is not a'",
    "layer 3 has 4000 experts, above TensorRT's 3840": "names no action",
    "layer 3 has 4000 experts; too many for TensorRT": "names no action",
    "config.json names no model_type; download it again": "a fresh copy would not help",
    "config.json is wrong at 3; check it.": "ends in a full stop",
    "config.json is wrong at 3. It is damaged; check it": "two sentences",
    "config.json is wrong:\n3; check it": "more than one line",
}


@pytest.mark.parametrize("message", GOOD)
def test_good_messages(message: str) -> None:
    assert messages.template_faults(message) == []


@pytest.mark.parametrize("message", BAD)
def test_bad_messages(message: str) -> None:
    assert messages.template_faults(message) == [BAD[message]]


def test_messages_of_the_source() -> None:
    found = dict(messages.templates())
    assert len(found) > 200
    assert [f"{place}: {text}: {faults}" for place, text in found.items() if (faults := messages.template_faults(text))] == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("Magic bytes not found in footer. Either the file is corrupted or not Parquet."),
            "Magic bytes not found in footer",
        ),
        (OSError("cannot open:\n  a.so: no such file\n"), "cannot open: a.so: no such file"),
        (RuntimeError("version 1.25 of libx.so.3 is needed"), "version 1.25 of libx.so.3 is needed"),
        (ValueError("a\x1b[31m name"), "a\\x1b[31m name"),
        (KeyError(), "KeyError"),
    ],
)
def test_the_first_sentence_of_other_libraries_is_quoted(error: Exception, said: str) -> None:
    assert reason(error) == said


def test_no_message_quotes_an_exception_whole() -> None:
    """Other libraries write several sentences and lines, which our messages may not contain."""
    assert list(messages.whole_quotes()) == []


def test_messages_that_tests_provoke_are_checked(rq_compile: Run, stages: Path, out: Path) -> None:
    assert rq_compile("plan", stages / "plan.json", "-o", out / "plan.json").exit_code == 2
    assert len(messages.said) == 1
    messages.said["plan.py:1"] = "layer 3 has 4000 experts"
    assert messages.new_faults() == ["plan.py:1: ['names no action']"]
    assert messages.said == {}
