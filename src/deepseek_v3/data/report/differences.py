"""Where two texts differ, word by word, and where a text holds the words that decided about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from deepseek_v3.data.report.markup import Span

# Scripts without spaces between words are compared character by character.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[^\w\s]")


def differences(one: str, other: str) -> tuple[list[Span], list[Span]]:
    """The spans of each text that the other one lacks, white space aside."""
    words = [[match.span() for match in _WORD.finditer(text)] for text in (one, other)]
    matcher = SequenceMatcher(
        None,
        [one[start:stop] for start, stop in words[0]],
        [other[start:stop] for start, stop in words[1]],
        autojunk=False,
    )
    spans: tuple[list[Span], list[Span]] = ([], [])
    for kind, first, last, other_first, other_last in matcher.get_opcodes():
        if kind != "equal":
            spans[0].extend(_extent(words[0][first:last]))
            spans[1].extend(_extent(words[1][other_first:other_last]))
    return spans


def occurrences(text: str, trigger: str) -> list[Span]:
    """Where the trigger's words stand in the text, whatever their letter case and the white space between them."""
    words = trigger.split()
    if not words:
        return []
    phrase = r"\s*".join(map(re.escape, words))
    pattern = re.compile(f"(?:{phrase})+", re.IGNORECASE)
    return [match.span() for match in pattern.finditer(text)]


def _extent(spans: Sequence[Span]) -> list[Span]:
    return [(spans[0][0], spans[-1][1])] if spans else []
