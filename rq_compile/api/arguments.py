"""What the functions of the API take in several forms: files or paths, models or folders, texts or files of texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from rq_compile.texts import Text, chat_template, open_texts

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from rq_compile.architectures.model import Model

File = str | PathLike[str]
# Names to contents, or files: .txt, .jsonl and .parquet (see ``rq_compile.texts``).
Texts = Mapping[str, str | Text] | File | Sequence[File]
# Called with the amount done and the total.
Progress = Callable[[int, int], None]

LOG = logging.getLogger("rq_compile")


def is_file(given: object) -> TypeIs[File]:
    """Whether ``given`` is a path, and not what the file holds."""
    return isinstance(given, str | PathLike)


def opened(model: Model | File) -> Model:
    """The model, opened if ``model`` is the folder of a checkpoint; its remarks are logged then.

    Raises:
        UserError: see ``rq_compile.open``.
    """
    if not is_file(model):
        return model
    from rq_compile.architectures.model import Model as Opened

    result = Opened.open(Path(model))
    for remark in result.remarks:
        LOG.info(remark)
    return result


def contents(texts: Texts, model: Model) -> dict[str, Text]:
    """The texts by name. Conversations are written with the chat template of ``model``."""
    if isinstance(texts, Mapping):
        return {name: Text.of(text) for name, text in texts.items()}
    return open_texts(files(texts), render=chat_template(model.path))


def files(texts: Texts) -> list[Path]:
    """The files among ``texts``."""
    if isinstance(texts, Mapping):
        return []
    return [Path(file) for file in ([texts] if is_file(texts) else texts)]


def silent(*told: object) -> None:
    """Progress that is told to nobody."""
