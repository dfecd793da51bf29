"""A checkpoint's tokenizer, as transformers reads it, and texts as token ids."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tokenizers import Tokenizer

from rq_compile.errors import UserError, reason

# Characters of a text that are encoded at a time, and the part of them that two neighbours share.
WINDOW, SHARED = 1 << 16, 1 / 32
# Two neighbours are joined in the middle of as many tokens that both have.
AGREEING = 32


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in ``folder``, as ``AutoTokenizer`` reads it: with the tokens that only
    ``tokenizer_config.json`` adds, and with the special tokens around a text. Truncation and padding are off.

    No code of the checkpoint is run. If ``AutoTokenizer`` would need such code, its general class reads the same files.

    Raises:
        UserError: there is no ``tokenizer.json``, or it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(_missing(folder), 2)
    try:
        Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # tokenizers raises no narrower class
        raise UserError(
            f"{path} cannot be read: {reason(error)}; put one in its place that the library tokenizers saved", 2
        ) from error
    with utf8_path(folder) as readable:
        tokenizer = _of_transformers(readable, folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _missing(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file() or (folder / "vocab.json").is_file():
        code = f"from transformers import AutoTokenizer as A; A.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        return f'{folder} has no tokenizer.json; make one from its older files: python -c "{code}" (needs sentencepiece)'
    return f"{folder} has no tokenizer.json; copy the model's tokenizer.json beside its config.json"


@contextmanager
def utf8_path(folder: Path) -> Iterator[Path]:
    """A path to ``folder`` that is valid UTF-8: its own, or a link for as long as the path is needed."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        with TemporaryDirectory() as place:
            link = Path(place) / "model"
            link.symlink_to(folder.resolve())
            yield link
    else:
        yield folder


def _of_transformers(folder: Path, named: Path) -> Tokenizer:
    """``named``: the folder's name in messages."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    failure: Exception = TypeError("it is not a fast tokenizer")
    for reader in (AutoTokenizer, PreTrainedTokenizerFast):
        try:
            read = reader.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            if isinstance(read, PreTrainedTokenizerFast):
                return read.backend_tokenizer
        except Exception as error:  # a tokenizer_config.json may be wrong in any way
            failure = error
    raise UserError(
        f"transformers cannot read the tokenizer of {named}: {reason(failure)}; correct its tokenizer_config.json", 2
    ) from failure


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids int64 ``[tokens]`` of ``text``, without special tokens around it."""
    return np.concatenate(list(encode_pieces(tokenizer, [text])))


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """Token ids int64 of the text that ``pieces`` make up, without special tokens around it, part after part.

    A long text is encoded in overlapping windows, whatever its pieces are, since an encoding takes some 200 bytes a character.
    Two neighbours are joined where both have the same ``AGREEING`` tokens at the same places, away from the ends of either. Where
    they have not, they become one window, and the next is as long; in the end there is one as long as the text.
    """
    reader = _Reader(pieces)
    window = reader.take(WINDOW)
    ids, places = _encoded(tokenizer, window)
    while more := reader.take(max(WINDOW, len(window)) - _shared(window)):
        shared = _shared(window)
        start = len(window) - shared
        next_window = window[start:] + more
        next_ids, next_places = _encoded(tokenizer, next_window)
        # From the middle of what they share to a little before the end of the first.
        inside = slice(*np.searchsorted(places, [start + shared // 2, start + shared - shared // 8]))
        joint = _joint(_pairs(ids[inside], places[inside] - start), _pairs(next_ids, next_places))
        if joint is None:
            window += more
            ids, places = _encoded(tokenizer, window)
        else:
            yield ids[: inside.start + joint[0]]
            window, ids, places = next_window, next_ids[joint[1] :], next_places[joint[1] :]
    yield ids


def _shared(window: str) -> int:
    return int(len(window) * SHARED)


class _Reader:
    """Characters of a text that comes in pieces of any length."""

    def __init__(self, pieces: Iterable[str]) -> None:
        # None is long, so that what is left of one is not.
        self._pieces = (piece[start : start + WINDOW] for piece in pieces for start in range(0, len(piece), WINDOW))
        self._left = ""

    def take(self, count: int) -> str:
        """The next ``count`` characters, or those that are left."""
        held, size = [self._left], len(self._left)
        while size < count and (piece := next(self._pieces, None)) is not None:
            held.append(piece)
            size += len(piece)
        text = "".join(held)
        self._left = text[count:]
        return text[:count]


def check_known(name: str, ids: np.ndarray, vocabulary: int) -> None:
    """
    Raises:
        UserError: the text ``name`` has a token outside a vocabulary of ``vocabulary`` tokens.
    """
    if len(ids) and (highest := int(ids.max())) >= vocabulary:
        raise UserError(
            f"{name}: the tokenizer gives the token {highest}, but the model has {vocabulary} tokens (0-{vocabulary - 1}); "
            "give text without it, or the model's own tokenizer.json",
            2,
        )


def _encoded(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and at which character of ``text`` each begins."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    places = np.fromiter((place for place, _ in encoding.offsets), np.int64, len(encoding.ids))
    return np.asarray(encoding.ids, np.int64), places


def _pairs(ids: np.ndarray, places: np.ndarray) -> np.ndarray:
    return np.stack([ids, places], axis=1)


def _joint(first: np.ndarray, second: np.ndarray) -> tuple[int, int] | None:
    """The positions, in both, of the middle of the first run of ``AGREEING`` equal rows; None if there is none."""
    for at in range(len(first) - AGREEING + 1):
        run = first[at : at + AGREEING]
        for other in np.flatnonzero((second == run[0]).all(axis=1)):
            if np.array_equal(run, second[other : other + AGREEING]):
                return at + AGREEING // 2, int(other) + AGREEING // 2
    return None
