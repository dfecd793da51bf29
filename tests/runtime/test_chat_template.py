"""Conversations are rendered as by transformers' ``apply_chat_template``."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from command_line import python

from rq_compile.checkpoint.chat_template import chat_template_source, special_tokens
from rq_compile.errors import UserError
from rq_compile.standalone.chat_template import ChatTemplate, ChatTemplateError

pytestmark = pytest.mark.quick

# Templates in the manners of published models, each with something that others do not use.
TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(tiny.__file__).parent / "chat_templates").iterdir())}
SAY: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Hello, who are you?"}],
    "with a system": [{"role": "system", "content": "  Be brief. "}, {"role": "user", "content": "Why?\n"}],
    "several turns": [
        {"role": "user", "content": "a <b> & \"c\" ä 日本 🤗"},
        {"role": "assistant", "content": "d", "reasoning": "so", "name": None},
        {"role": "user", "content": "</think>\n\ne"},
    ],
    "wrong order": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "tools": [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é"}}}]},
        {"role": "tool", "content": "sunny"},
    ],
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}]
VARIABLES: list[dict[str, Any]] = [{}, {"tools": TOOLS}, {"enable_thinking": False, "date_string": "1 Jan"}]


def outcome(render: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The prompt, or why there is none."""
    try:
        return render(*arguments, **options)
    except Exception as error:
        return f"refused: {error}"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("said", SAY)
def test_prompts_are_those_of_transformers(name: str, said: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    template = ChatTemplate(TEMPLATES[name], tokenizer.special_tokens_map)
    for variables in VARIABLES:
        for prompted in (False, True):
            given = {"add_generation_prompt": prompted, **variables}
            wanted = outcome(tokenizer.apply_chat_template, SAY[said], tokenize=False, **given)
            assert outcome(template.render, SAY[said], **given) == wanted


@pytest.mark.parametrize("name", ["marked_turns", "dated", "training"])
def test_an_answer_can_continue_the_last_message(name: str) -> None:
    said = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    wanted = tokenizer.apply_chat_template(said, tokenize=False, continue_final_message=True)
    template = ChatTemplate(TEMPLATES[name], tokenizer.special_tokens_map)
    given = {"add_generation_prompt": False, "continue_final_message": True}
    assert template.render(said, **given) == wanted
    assert wanted.endswith("One, two,")
    for last in ([], [{"role": "user"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}]):
        with pytest.raises(ChatTemplateError, match="no text to continue"):
            template.render(last, **given)


HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "formats": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "changes": "{{ messages.append(1) }}",
    "underscores": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "underscores in arguments": "{{ namespace(__init__=1) }}",
    "methods of dict": "{{ dict.mro() }}",
    "files": "{% include '/etc/passwd' %}",
    "an error": "{{ 1 / 0 }}",
    "a long range": "{{ range(10 ** 9) | list }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_templates_are_in_a_sandbox(name: str) -> None:
    template = ChatTemplate(HOSTILE[name])
    with pytest.raises(ChatTemplateError):
        template.render(SAY["one turn"])


@pytest.mark.parametrize("source", ["{% for %}", "{{ a b }}", "{% endif %}", "{{ x | no_such_filter }}"])
def test_what_is_not_a_template(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source)


def test_it_needs_nothing_but_jinja2() -> None:
    code = "import sys; from rq_compile.standalone.chat_template import ChatTemplate as T; "
    code += (
        "print(T('{{ messages[0].content }}').render([{'content': 'a'}]), 'transformers' in sys.modules, 'torch' in sys.modules)"
    )
    assert python("-c", code).communicate()[0].split() == ["a", "False", "False"], sys.path


# Where a checkpoint has its template.


def test_sources(tmp_path: Path) -> None:
    assert chat_template_source(tmp_path) is None
    assert special_tokens(tmp_path) == {}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<old>", "cls_token": {"content": "<cls>"}}))
    stated = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    for template, source in (("t", "t"), ([{"name": "tool_use", "template": "u"}, {"name": "default", "template": "d"}], "d")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**stated, "chat_template": template}))
        assert chat_template_source(tmp_path) == source
    assert special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<cls>"}
    (tmp_path / "chat_template.jinja").write_text("file")
    assert chat_template_source(tmp_path) == "file"


@pytest.mark.parametrize("spoil", [b"\xff\xfe", b"x" * (2 << 20), None])
def test_sources_that_cannot_be_read(tmp_path: Path, spoil: bytes | None) -> None:
    if spoil is None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": {"default": "t"}}))
    else:
        (tmp_path / "chat_template.jinja").write_bytes(spoil)
    with pytest.raises(UserError, match=r"is not UTF-8 text|too long for a chat template|that is not text; correct"):
        chat_template_source(tmp_path)
