"""Turns the messages of a conversation into the ids of a prompt, by the chat template of a tokenizer.

A template is a program in the language Jinja. It comes with the files of a model, so it runs in Jinja's sandbox,
with the functions that Transformers gives it and no others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_v3.config.text_files import read_text
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import GenerationError
from deepseek_v3.utils.text import truncate

Message = Mapping[str, str]

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # code points that no text should hold
_MOST_BYTES = 2**22  # of a file with a template
_LONGEST_REASON = 300  # characters of a template's own error


class ChatTemplate:
    """The chat template of a tokenizer.

    In a rendered prompt the names of the tokenizer's markers are markers. Names inside the messages are text,
    except in those of the assistant, which the model has written: otherwise text that a user pastes could end a
    message and begin another one. `source` is the template of the tokenizer's config, if none is given.

    Raises GenerationError if there is no template, or if it is not valid.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        self._tokenizer = tokenizer
        source = template_of(tokenizer) if source is None else source
        if source is None:
            raise GenerationError(
                "the model's tokenizer has no chat template, so messages cannot become a prompt; name a file with "
                "one by --chat-template, or continue plain text"
            )
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise GenerationError(f"the chat template is not valid: {_reason(error)}") from None
        config = tokenizer.config or {}
        self._names = {role: name for role in _ROLES if (name := _name_of(config.get(role))) is not None}
        self._ids = {name: id_ for id_, name in tokenizer.markers.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, up to the point where the assistant's next message begins.

        Raises GenerationError if the template refuses the messages, and DataError for text that is not Unicode.
        """
        return self._encode(*self._render(messages))

    def _render(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The prompt as text, and the character that stands inside names of markers that are text."""
        text = "".join(message["content"] for message in messages)
        split = next((each for each in _NONCHARACTERS if each not in text), None)
        if split is None:
            raise GenerationError("the messages hold every one of the noncharacters U+FDD0 to U+FDEF; remove one")
        shown = [self._with_split_markers(message, split) for message in messages]
        try:
            return self._template.render(messages=shown, add_generation_prompt=True, **self._names), split
        except Exception as error:  # noqa: BLE001 -- a template is a program, which may raise anything
            raise GenerationError(f"the chat template refuses the messages: {_reason(error)}") from None

    def _with_split_markers(self, message: Message, split: str) -> dict[str, str]:
        if message["role"] == "assistant":
            return dict(message)
        content = self._marker.sub(lambda match: f"{match[0][0]}{split}{match[0][1:]}", message["content"])
        return {**message, "content": content}

    def _encode(self, text: str, split: str) -> list[int]:
        pieces = [piece.replace(split, "") for piece in self._marker.split(text)]
        ids = iter(self._tokenizer.encode_batch(pieces))
        found = list(next(ids))
        for name, piece in zip(self._marker.findall(text), ids, strict=True):
            found += [self._ids[name], *piece]
        return found


def read_template(file: Path) -> str:
    """The source of a chat template in a file. Raises ConfigError."""
    return read_text(file, _MOST_BYTES)


def template_of(tokenizer: Tokenizer) -> str | None:
    """The source of a tokenizer's chat template, the one named "default" of several; None without one."""
    found: Any = (tokenizer.config or {}).get("chat_template")
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, dict) and each.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) and found else None


class _Generation(Extension):
    """The block `{% generation %}`, with which templates mark what the assistant wrote; its text stays as it is."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it as an attribute of instances

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """A sandbox with what Transformers offers to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is, where the filter of Jinja would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _name_of(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _reason(error: Exception) -> str:
    return truncate(" ".join(str(error).split()) or type(error).__name__, _LONGEST_REASON)
