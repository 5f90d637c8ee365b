"""Decoding token ids to text while they are generated, one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepseek_v3.data.tokens.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # decoding shows it for bytes that are not a complete character
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_JOINS = ("ByteLevel", "Fuse")  # steps that join all tokens to one text
_HARMLESS = ("Fuse", "Strip")  # steps that change nothing inside the joined text


class StreamDecoder:
    """Decodes ids that arrive one by one, and returns text as soon as later ids cannot change it.

    The text continues that of `prompt`: the results of all calls of `push`, followed by the result of `flush`,
    equal `Tokenizer.decode` of the prompt and the pushed ids, without the first characters, which show the prompt.

    Text is held back while later ids can change it: bytes of an incomplete character, and, with byte tokens such as
    `<0xE4>`, each run of them, because one wrong byte turns the whole run into U+FFFD. If the decoder rewrites the
    joined text, only `flush` returns text.

    Each step decodes only few ids: those since the last returned text, with those of the step before as context.
    The context decodes to some text, so new ids are never at the start of the decoded text, which a decoder may
    treat differently.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._by_bytes = any(step["type"] == "ByteFallback" for step in tokenizer.decoder_steps)
        self._only_appends = _only_appends(tokenizer.decoder_steps)
        self._ids = list(prompt)
        self._num_context = len(self._ids)
        self._num_shown = len(tokenizer.decode(self._ids))

    def push(self, *ids: int) -> str:
        """Adds the next ids, at least one, and returns the text that the last of them completes, often empty."""
        self._ids += ids
        token = self._tokenizer.token(ids[-1])
        if not self._only_appends or token is None or (self._by_bytes and _BYTE.fullmatch(token)):
            return ""
        text = self._tokenizer.decode(self._ids)
        certain = text.rstrip(_REPLACEMENT)
        new = certain[self._num_shown :]
        self._num_shown += len(new)
        if certain == text:
            self._shorten()
        return new

    def flush(self) -> str:
        """Ends the text: returns the text that was held back, with U+FFFD for an incomplete character.

        Ids that are pushed afterwards start a new text.
        """
        rest = self._tokenizer.decode(self._ids)[self._num_shown :]
        self._ids, self._num_context, self._num_shown = [], 0, 0
        return rest

    def _shorten(self) -> None:
        """Replaces the context by the ids after it, if these decode to any text."""
        recent = self._ids[self._num_context :]
        if shown := self._tokenizer.decode(recent):
            self._ids, self._num_shown = recent, len(shown)
        self._num_context = len(self._ids)


def _only_appends(steps: Iterable[Mapping[str, Any]]) -> bool:
    """Whether further ids only append text, because no decoding step looks across the borders of tokens."""
    joined = False
    for step in steps:
        if joined and step["type"] not in _HARMLESS:
            return False
        joined = joined or step["type"] in _JOINS
    return True
