"""Encoding text in pieces gives the same tokens as at once, and a stream of tokens gives the text that they decode to
together."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rq_compile.checkpoint import tokenizer as reading
from rq_compile.checkpoint.tokenizer import encode, encode_pieces
from rq_compile.standalone.text import MOST_HELD, StopStrings, TextStream, argument_text

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(scope="module", params=text_tokenizers.KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return text_tokenizers.KINDS[request.param]()


# Encoding in pieces.

TEXTS = {
    "words": text_tokenizers.TEXT,
    "lines": "a b\n\n\nthe the\r\n \n  x\t\ty\n" * 60,
    "wide": "näïve 日本語のテキスト 🤗👩‍👩‍👧 e\u0301 <s> the </s> " * 40,
    "spaces": "the " + " " * 700 + "end. " + "\n" * 600 + "the end",
    "one letter": "a" * 3000,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("size", [256, 640, 1000])
def test_pieces_are_the_whole(tokenizer: Tokenizer, name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WINDOW", size)
    monkeypatch.setattr(reading, "SHARED", 0.5)
    monkeypatch.setattr(reading, "AGREEING", 8)
    ids = encode(tokenizer, TEXTS[name])
    assert ids.dtype == np.int64
    whole = tokenizer.encode(TEXTS[name], add_special_tokens=False).ids
    assert ids.tolist() == whole
    read = (TEXTS[name][start : start + 7] for start in range(0, len(TEXTS[name]), 7))
    assert np.concatenate(list(encode_pieces(tokenizer, read))).tolist() == whole


def test_pieces_of_the_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_file(str(SAMPLES / "olmoe" / "tokenizer.json"))
    text = "\n\n".join(path.read_text() for path in sorted((SAMPLES / "text").glob("*.txt")))
    assert len(text) > 2 * reading.WINDOW
    longest = []
    whole = reading._encoded

    def encoded(*arguments: Any) -> Any:
        longest.append(len(arguments[1]))
        return whole(*arguments)

    monkeypatch.setattr(reading, "_encoded", encoded)
    assert encode(tokenizer, text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert longest[:-1] == [reading.WINDOW] * (len(longest) - 1)


@pytest.mark.parametrize("text", ["", "a", "\n"])
def test_short_texts(tokenizer: Tokenizer, text: str) -> None:
    assert encode(tokenizer, text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


# Decoding token by token.


def streamed(tokenizer: Tokenizer, tokens: Iterable[int], before: Iterable[int] = ()) -> list[str]:
    stream = TextStream(tokenizer, list(before))
    return [*(stream.push(token) for token in tokens), stream.end()]


@pytest.mark.parametrize("name", TEXTS)
def test_a_stream_is_what_its_tokens_decode_to(tokenizer: Tokenizer, name: str) -> None:
    ids = tokenizer.encode(TEXTS[name][:600], add_special_tokens=False).ids
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def numbers(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    found = [tokenizer.token_to_id(token) for token in tokens]
    return [number for number in found if number is not None]


def test_bytes_that_are_no_character_do_not_end_a_stream() -> None:
    tokenizer = text_tokenizers.byte_fallback()
    for bytes_, wanted in (
        (["<0x0A>", "<0xF0>", "<0x9F>"], "\n\ufffd\ufffd the"),
        (["<0xF0>", "<0x9F>"], "\ufffd\ufffd the"),
        (["a", "<0xC3>"], "a\ufffd the"),
        (["<0xC3>", "<0xA4>", "<0xFF>"], "ä\ufffd the"),
        (["<0xFF>"] * 30, "\ufffd" * 30 + " the"),
    ):
        tokens = numbers(tokenizer, *bytes_, "▁the")
        assert "".join(streamed(tokenizer, tokens)) == wanted
        # It continues as if nothing had happened.
        more = numbers(tokenizer, "▁a", "<0xC3>", "<0xA4>", "<0x0A>")
        assert "".join(streamed(tokenizer, [*tokens, *more])) == f"{wanted} aä\n"


def test_a_stream_that_goes_on_after_a_line_break_with_a_whole_character() -> None:
    tokenizer = text_tokenizers.byte_fallback()
    tokens = numbers(tokenizer, "<0x0A>", *(f"<0x{byte:02X}>" for byte in "🤗".encode()), "▁a")
    assert streamed(tokenizer, tokens) == ["\n", "", "", "", "🤗", " a", ""]


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_what_is_held_at_the_end_is_sent(kind: str) -> None:
    tokenizer = text_tokenizers.KINDS[kind]()
    ids = tokenizer.encode("a 🤗", add_special_tokens=False).ids
    for length in range(len(ids) + 1):
        assert "".join(streamed(tokenizer, ids[:length])) == tokenizer.decode(ids[:length])


def test_special_tokens_neither_show_nor_take_a_space() -> None:
    tokenizer = text_tokenizers.byte_fallback()
    tokens = numbers(tokenizer, "<s>", "▁the", "</s>", "▁a", *["<s>"] * (3 * MOST_HELD), "▁the")
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens) == "the a the"


def test_text_before_a_stream_gives_it_its_space() -> None:
    tokenizer = text_tokenizers.byte_fallback()
    the, a = numbers(tokenizer, "▁the", "▁a")
    assert streamed(tokenizer, [a]) == ["a", ""]
    assert streamed(tokenizer, [a], before=[the]) == [" a", ""]


def test_a_stream_of_random_tokens_is_bounded_and_whole_characters_stay() -> None:
    # Without the bytes of letters: after them, byte fallback turns a letter that was already sent into U+FFFD.
    for (kind, first), seed in itertools.product((("byte level", 3), ("byte fallback", 3 + 128)), range(20)):
        tokenizer = text_tokenizers.KINDS[kind]()
        size, random = tokenizer.get_vocab_size(), np.random.default_rng(seed)
        tokens = random.integers(first, size, 60).tolist()
        stream, longest = TextStream(tokenizer), 0
        text = ""
        for token in tokens:
            text += stream.push(token)
            longest = max(longest, len(stream._held) + len(stream._before))
        text += stream.end()
        assert longest <= 2 * MOST_HELD
        # Bytes that are not a character may be counted differently; everything else is there, in order.
        known = [c for c in tokenizer.decode(tokens) if c.isascii() and c.isalpha()]
        assert [c for c in text if c.isascii() and c.isalpha()] == known


# Text from a command line.


def test_arguments_are_utf8_whatever_the_locale() -> None:
    root = Path(reading.__file__).parents[2]
    code = "import sys; from rq_compile.standalone.text import argument_text; "
    code += "sys.stdout.buffer.write(argument_text(sys.argv[1]).encode())"
    environment = {**os.environ, "PYTHONPATH": str(root), "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for text in ("Äpfel", "plain", "日本語 🤗"):
        said = subprocess.run([sys.executable, "-P", "-c", code, text.encode()], env=environment, capture_output=True, check=True)
        assert said.stdout.decode() == text
    with pytest.raises(UnicodeDecodeError):
        argument_text(b"\xff".decode(errors="surrogateescape"))


# Stop strings.


def first_to_end(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, by reading character after character."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    text=st.text("abc\n", max_size=30),
    stops=st.lists(st.text("abc\n", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_a_text_ends_before_its_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    wanted, found = first_to_end(text, stops)
    stream, said = StopStrings(stops), ""
    for start, end in itertools.pairwise(sorted({0, *cuts, len(text)} & set(range(len(text) + 1))) or [0]):
        said += stream.push(text[start:end])
        assert wanted.startswith(said)  # nothing of a stop string, not even for a while
        # Only what may still become a stop string is held back.
        if stream.found is None:
            held = text[len(said) : end]
            assert not held or any(stop.startswith(held) for stop in stops)
    assert (said + stream.end(), stream.found) == (wanted, found)
    assert stream.push("more") == "" or found is None


@pytest.mark.parametrize("stop", ["over the", "lazy dog. In", "\n", "x j", "T", "nothing of it", "tokens.\nT"])
def test_stop_strings_over_several_tokens(tokenizer: Tokenizer, stop: str) -> None:
    ids = tokenizer.encode(text_tokenizers.TEXT[:300], add_special_tokens=False).ids
    whole = tokenizer.decode(ids)
    stream, text = TextStream(tokenizer, stop=[stop, "never"]), ""
    for token in ids:
        text += stream.push(token)
        if stream.stopped:
            break
    assert text + stream.end() == whole.split(stop)[0]
    assert stream.stopped == (stop if stop in whole else None)
    assert stream.push(ids[0]) == "" or stream.stopped is None


def test_a_stop_string_in_what_is_held_at_the_end() -> None:
    tokenizer = text_tokenizers.byte_fallback()
    stream = TextStream(tokenizer, stop=["\ufffd"])
    assert [stream.push(token) for token in numbers(tokenizer, "▁a", "<0xF0>")] == ["a", ""]
    assert (stream.end(), stream.stopped) == ("", "\ufffd")
