"""What finds one kind of personal data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

Spans: TypeAlias = Iterator[tuple[int, int]]


@dataclass(frozen=True)
class Finder:
    """`find` yields where pieces start and end, in order and apart; in a time that grows with the text's length.

    `pretest` is a pattern for RE2, without look-around, that matches in every text in which `find` finds anything.
    To both of them digits and letters are those of ASCII, so text of other scripts may stand right beside a piece.
    """

    pretest: str
    find: Callable[[str], Spans]
