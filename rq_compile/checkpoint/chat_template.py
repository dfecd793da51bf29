"""A checkpoint's chat template, and the special tokens that it names."""

from pathlib import Path
from typing import Any

from rq_compile.checkpoint.folder import read_json
from rq_compile.errors import UserError

# The names of special tokens in transformers.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LARGEST = 1 << 20


def chat_template_source(folder: Path) -> str | None:
    """The template's source: ``chat_template.jinja``, otherwise ``tokenizer_config.json``; None if there is none. Of several, the
    one called "default".

    Raises:
        UserError: a file cannot be read, or the template is not text.
    """
    file = folder / "chat_template.jinja"
    if not file.is_file():
        template = _settings(folder, "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            template = named.get("default")
        if template is not None and not isinstance(template, str):
            raise UserError(f"{folder} has a chat_template that is not text; correct its tokenizer_config.json", 2)
        return template
    try:
        size = file.stat().st_size
        if size > LARGEST:
            raise UserError(
                f"{file} has {size} bytes, which is too long for a chat template; put the model's own in its place", 2
            )
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; check its permissions", 2) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text; convert it, or put the model's own in its place", 2) from error


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of the special tokens by name, for example ``bos_token``; without those that the checkpoint does not have.

    Raises:
        UserError: a file cannot be read.
    """
    settings = {**_settings(folder, "special_tokens_map.json"), **_settings(folder, "tokenizer_config.json")}
    texts = {name: _text(settings.get(name)) for name in NAMES}
    return {name: text for name, text in texts.items() if text is not None}


def _text(token: Any) -> str | None:
    if isinstance(token, dict):  # together with settings for stripping
        token = token.get("content")
    return token if isinstance(token, str) else None


def _settings(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    return read_json(file) if file.is_file() else {}
