"""Text for standard output: tables, paragraphs, and signs that its encoding may lack.

FOLDED: Numbers as people read them: 3.80B, $1,200.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from itertools import zip_longest
from typing import Any

_PLAIN = {"✓": "OK", "✗": "X", "×": "x", "–": "-", "─": "-"}
_WIDTH = 110
# Text that stands in a YAML file or on a command line without quotes, unless it reads as a number or the like.
_PLAIN_TEXT = re.compile(r"[\w./+~@%-]+")
_READ_AS_OTHER = re.compile(r"[-+.]?\d.*|[-+]?\.(inf|nan)|~|null|true|false|yes|no|on|off", re.IGNORECASE)
_LONGEST_VALUE = 200
_DEEPEST_VALUE = 8


def printable(text: str) -> str:
    """The text as standard output can print it: where signs are missing, plain ones such as OK, X and x."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        for sign, plain in _PLAIN.items():
            text = text.replace(sign, plain)
        return text.encode(encoding, "replace").decode(encoding)
    return text


def format_value(value: Any) -> str:
    """A value as a YAML file or a command line writes it, on one line: null, true, 5, name, 'two words', [1, 2].

    Text that would be read as something else is quoted; what is longer than 200 characters is cut in the middle.
    """
    text = _value_text(value)
    if len(text) <= _LONGEST_VALUE:
        return text
    half = _LONGEST_VALUE // 2
    return f"{text[:half]} … {text[-half:]} ({len(text):,} characters)"


def _value_text(value: Any, depth: int = 0) -> str:
    if depth > _DEEPEST_VALUE:
        return "…"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return _value_text(value.value, depth)
    if isinstance(value, Mapping):
        pairs = (f"{_value_text(key)}: {_value_text(each, depth + 1)}" for key, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes)):
        return f"[{', '.join(_value_text(each, depth + 1) for each in value)}]"
    if isinstance(value, (int, float)):
        return _number_text(value)
    return _quoted(value.decode(errors="replace") if isinstance(value, bytes) else str(value))


def _number_text(number: float) -> str:
    try:
        return str(number)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"a number of {number.bit_length():,} bits" if isinstance(number, int) else "a number"


def _quoted(text: str) -> str:
    if _PLAIN_TEXT.fullmatch(text) and not _READ_AS_OTHER.fullmatch(text):
        return text
    if text.isprintable() and "'" not in text:
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=not text.isprintable())


def output_width() -> int:
    """Columns of the terminal; 110 where the output is none."""
    return shutil.get_terminal_size((_WIDTH, 0)).columns if sys.stdout.isatty() else _WIDTH


def paragraph(text: str) -> str:
    """The text in lines no wider than the output, broken at spaces alone."""
    return textwrap.fill(printable(text), output_width(), break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> list[str]:
    """Lines of aligned columns, as wide as they need: the header, a rule, the rows.

    Columns are aligned to the right, except for the first and those in `left`.
    """
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_left = [index == 0 or name in left for index, name in enumerate(header)]
    lines = [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, is_left, strict=True)
        )
        for row in cells
    ]
    return [lines[0], printable("─") * len(lines[0]), *lines[1:]]


def side_by_side(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Both blocks beside each other where the output is wide enough, else one below the other; ends stripped."""
    gap, width = "    ", max(map(len, one))
    if width + len(gap) + max(map(len, other)) > output_width():
        return [line.rstrip() for line in (*one, "", *other)]
    return [(left.ljust(width) + gap + right).rstrip() for left, right in zip_longest(one, other, fillvalue="")]


def humanize(name: str) -> str:
    """The name of a field or a part in words."""
    return name.replace("_", " ")


def pluralize(number: int, thing: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def format_count(number: int) -> str:
    """A count in trillions, billions or millions with two decimals; below 10,000 as it is."""
    for size, unit in ((1e12, "T"), (1e9, "B")):
        if round(number / size, 2) >= 1:
            return f"{number / size:.2f}{unit}"
    return f"{number / 1e6:.2f}M" if number >= 10_000 else f"{number:,}"


def three_figures(number: float) -> str:
    """Three significant figures, or all before the point: 0.0123, 4.57, 12,345."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def dollars(amount: float) -> str:
    """Dollars, and cents up to a hundred of them."""
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:.2f}"


def gibibytes(number: float) -> str:
    """Bytes in GiB with one decimal."""
    return f"{number / 2**30:,.1f}"


def format_distinct(one: float, other: float, shown: Callable[[Any], str]) -> tuple[str, str]:
    """Two different numbers as they are shown, or with all their digits where that would make them the same."""
    short = (shown(one), shown(other))
    return short if short[0] != short[1] else (f"{one:,}", f"{other:,}")
