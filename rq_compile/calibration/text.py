"""Calibration texts as batches of token rows, right-padded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from rq_compile.architectures.model import Model
from rq_compile.checkpoint.tokenizer import check_known, encode_pieces
from rq_compile.errors import UserError
from rq_compile.texts import Text

MIN_TOKENS = 2

Sequence = tuple[np.ndarray, np.ndarray]  # token ids, and which of them are measured, both [tokens]


@dataclass(frozen=True)
class Rows:
    """The part of a batch that one side of a model reads, all ``[batch, length]``.

    ``ids`` int64; ``real`` is False on padding; ``measured`` (a subset of ``real``) marks the tokens whose expert inputs are
    kept for the measurements.
    """

    ids: np.ndarray
    real: np.ndarray
    measured: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Sequences of only one text, number ``text``. ``encoder`` is None for a decoder-only model."""

    text: int
    decoder: Rows
    encoder: Rows | None = None

    @property
    def sides(self) -> list[Rows]:
        return [self.decoder] if self.encoder is None else [self.encoder, self.decoder]

    @property
    def tokens(self) -> int:
        return sum(int(rows.real.sum()) for rows in self.sides)

    @property
    def padding_tokens(self) -> int:
        return sum(rows.real.size for rows in self.sides) - self.tokens


@dataclass(frozen=True)
class Tokens:
    """``of``: the first token ids of each text, int64 ``[tokens]``, without special tokens. ``cut``: the names of the texts that
    have more tokens."""

    of: list[np.ndarray]
    cut: list[str]


def tokenize(model: Model, texts: Mapping[str, str | Text], most: int | None = None) -> Tokens:
    """The tokens of ``texts``, at most ``most`` in total: all of a short text, and equally many of each long one. No more of a
    text is read than is needed.

    Raises:
        UserError: the checkpoint has no readable tokenizer.json, a text has fewer than two tokens or one that the model does not
            know, or ``most`` is less than two for each text.
    """
    if most is not None and most < MIN_TOKENS * len(texts):
        raise UserError(
            f"--tokens {most} is too few for {len(texts)} texts, of each of which at least {MIN_TOKENS} are run; "
            f"give at least {MIN_TOKENS * len(texts)}",
            2,
        )
    found = [_first(model, name, Text.of(text), None if most is None else most + 1) for name, text in texts.items()]
    counts = [len(ids) for ids in found]
    shares = counts if most is None else _shares(counts, most)
    cut = [name for name, count, share in zip(texts, counts, shares, strict=True) if share < count]
    return Tokens([ids[:share] for ids, share in zip(found, shares, strict=True)], cut)


def _first(model: Model, name: str, text: Text, most: int | None) -> np.ndarray:
    parts, count = [np.zeros(0, np.int64)], 0
    for ids in encode_pieces(model.tokenizer, text.pieces()):
        check_known(name, ids, model.text_config.vocab_size)
        parts.append(ids)
        count += len(ids)
        if most is not None and count >= most:
            break
    if count < MIN_TOKENS:
        raise UserError(f"{name} has {count} tokens, but a calibration needs at least {MIN_TOKENS}; give a longer --text", 2)
    return np.concatenate(parts)[:most]


def _shares(counts: list[int], most: int) -> list[int]:
    """How many tokens of each text are run, ``most`` in total, if the texts have ``counts`` tokens."""
    shares, left = [0] * len(counts), most
    for done, number in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        shares[number] = min(counts[number], left // (len(counts) - done))
        left -= shares[number]
    return shares


def batches(
    texts: list[np.ndarray],
    *,
    batch_size: int,
    sequence_length: int,
    measured_tokens: int,
    decoder_start: int | None = None,
) -> Iterator[Batch]:
    """Cut each text into sequences of ``sequence_length`` tokens (the last one may be shorter), and group these into batches.

    ``measured_tokens`` tokens, evenly spread, are marked as measured, or all if there are fewer. With ``decoder_start`` (the
    first decoder token of an encoder-decoder model), the encoder reads the first half of each sequence. The decoder reads
    ``decoder_start`` and the second half without its last token, as in training, so both sides together have as many tokens as
    the text.
    """
    total = sum(len(ids) for ids in texts)
    first = 0
    for number, ids in enumerate(texts):
        position = np.arange(first, first + len(ids))
        measured = (position + 1) * measured_tokens // total > position * measured_tokens // total
        if measured_tokens >= total:
            measured[:] = True
        first += len(ids)
        cuts = range(sequence_length, len(ids), sequence_length)
        sequences = list(zip(np.split(ids, cuts), np.split(measured, cuts), strict=True))
        for start in range(0, len(sequences), batch_size):
            chosen = sequences[start : start + batch_size]
            if decoder_start is None:
                yield Batch(number, _padded(chosen))
            else:
                halves = [_halves(ids, kept, decoder_start) for ids, kept in chosen]
                yield Batch(
                    number, encoder=_padded([first for first, _ in halves]), decoder=_padded([last for _, last in halves])
                )


def _halves(ids: np.ndarray, measured: np.ndarray, decoder_start: int) -> tuple[Sequence, Sequence]:
    half = (len(ids) + 1) // 2
    shifted = np.concatenate([[decoder_start], ids[half:]])[: len(ids) - half]
    return (ids[:half], measured[:half]), (shifted, measured[half:])


def _padded(sequences: list[Sequence]) -> Rows:
    # A sequence of one token leaves no token for the decoder, which still needs a row.
    length = max(1, *(len(ids) for ids, _ in sequences))
    rows = Rows(*(np.zeros((len(sequences), length), dtype) for dtype in (np.int64, np.bool_, np.bool_)))
    for row, (ids, measured) in enumerate(sequences):
        rows.ids[row, : len(ids)] = ids
        rows.real[row, : len(ids)] = True
        rows.measured[row, : len(ids)] = measured
    return rows
