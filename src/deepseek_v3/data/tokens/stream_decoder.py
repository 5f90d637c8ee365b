"""Text from ids that arrive one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepseek_v3.data.tokens.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what decoding shows for bytes that are not, or not yet, a character
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_JOINS = ("ByteLevel", "Fuse")  # steps after which all tokens are one text
_HARMLESS = ("Fuse", "Strip")  # steps that change nothing inside such a text


class StreamDecoder:
    """Turns ids that arrive one by one into text, piece by piece as it becomes certain.

    The text continues that of `prompt`: all that `push` returned, followed by what `flush` returns, is
    `Tokenizer.decode` of prompt and pushed ids, less as many characters as it shows of the prompt alone.

    Text is held back while further ids can change it: bytes that are not yet a character, and with a vocabulary of
    tokens such as `<0xE4>` each run of them, because one wrong byte turns the whole run into U+FFFD. A decoder that
    rewrites the joined text gives all of it at the end.

    Each step decodes a few ids only: those since the text was last certain, and those of one step before as their
    context. The context shows some text, so that what decoders do to the first token or drop from the start of a
    text does not reach new ids.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._by_bytes = any(step["type"] == "ByteFallback" for step in tokenizer.decoder_steps)
        self._piecewise = _is_piecewise(tokenizer.decoder_steps)
        self._ids = list(prompt)
        self._num_context = len(self._ids)
        self._num_shown = len(tokenizer.decode(self._ids))

    def push(self, id_: int) -> str:
        """Takes the next id and returns the text that it completes, often none."""
        self._ids.append(id_)
        token = self._tokenizer.token(id_)
        if not self._piecewise or token is None or (self._by_bytes and _BYTE.fullmatch(token)):
            return ""
        text = self._tokenizer.decode(self._ids)
        certain = text.rstrip(_REPLACEMENT)
        new = certain[self._num_shown :]
        self._num_shown += len(new)
        if certain == text:
            self._shorten()
        return new

    def flush(self) -> str:
        """Ends the stream: returns what was held back, with U+FFFD for a character that never became whole.

        What is pushed afterwards is the start of a text of its own.
        """
        rest = self._tokenizer.decode(self._ids)[self._num_shown :]
        self._ids, self._num_context, self._num_shown = [], 0, 0
        return rest

    def _shorten(self) -> None:
        """Makes the ids behind the context the next context, if they show any text."""
        recent = self._ids[self._num_context :]
        if shown := self._tokenizer.decode(recent):
            self._ids, self._num_shown = recent, len(shown)
        self._num_context = len(self._ids)


def _is_piecewise(steps: Iterable[Mapping[str, Any]]) -> bool:
    """Whether more ids only add text: no step looks for anything across the borders of tokens."""
    joined = False
    for step in steps:
        if joined and step["type"] not in _HARMLESS:
            return False
        joined = joined or step["type"] in _JOINS
    return True
