"""A checkpoint's tokenizer.json."""

from pathlib import Path

from tokenizers import Tokenizer

from rq_compile.errors import UserError


def read_tokenizer(path: Path) -> Tokenizer:
    """
    Raises:
        UserError: it cannot be read.
    """
    try:
        return Tokenizer.from_buffer(path.read_bytes())  # takes no path that is not UTF-8
    except Exception as error:  # tokenizers raises no narrower class
        raise UserError(f"{path} cannot be read: {error}; download it again", 2) from error
