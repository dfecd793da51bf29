"""Conversations as prompts: a model's chat template, rendered as transformers' ``apply_chat_template`` renders it.

Templates are code of strangers. They run in the same sandbox as in transformers (jinja2's ``ImmutableSandboxedEnvironment``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Messages = Sequence[Mapping[str, Any]]
# Names under which an assistant's reasoning is passed on, the usual one first.
REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplateError(ValueError):
    """A template that is not valid, or that refuses a conversation."""


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """``special_tokens``: the texts of tokens by their names in the template, for example ``bos_token``.

        Raises:
            ChatTemplateError: ``source`` is not a template.
        """
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(str(error)) from error

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for the conversation ``messages``, each with a ``role`` and, usually, a ``content``.

        ``add_generation_prompt``: whether the prompt ends with the beginning of an answer. ``continue_final_message``: whether it
        ends within the last message, which the answer continues. ``variables`` are further variables of the template.

        Raises:
            ChatTemplateError: the template refuses the conversation, or fails.
        """
        kept = [_message(message) for message in messages]
        last = kept[-1].get("content") if kept else None
        if continue_final_message and not isinstance(last, str):
            raise ChatTemplateError("the last message has no text to continue")
        given = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            text = self._template.render(messages=kept, add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # a template is a program of a stranger, which can fail in any way
            raise ChatTemplateError(str(error) or type(error).__name__) from error
        return text if not continue_final_message or not isinstance(last, str) else _up_to(last, text)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without keys that are null, as transformers passes it on."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in REASONING if key in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _up_to(last: str, text: str) -> str:
    """``text`` without what follows the last message. Templates may strip a message."""
    place = text.rfind(last) if last in text else text.rfind(last.strip())
    if place < 0:
        raise ChatTemplateError("the template changes the last message, so that it cannot be continued")
    return text[: place + len(last if last in text else last.strip())]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dictionary(), namespace=_SafeNamespace
    )
    return environment


class _Generation(Extension):
    """The block ``{% generation %}``, which marks an assistant's words for training; here, its content is taken as it is."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dictionary:
    """``dict`` without the attributes of the class."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _SafeNamespace(Namespace):
    """A namespace whose attributes do not begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, *rest = arguments
        values = dict(*rest, **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
