"""Text as people read it: numbers and values, tables and paragraphs, in the encoding of standard output."""

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
# Text that needs no quotes in YAML or on a command line, unless it would be read as a number, a boolean or null.
_PLAIN_TEXT = re.compile(r"[\w./+~@%-]+")
_READ_AS_OTHER = re.compile(r"[-+.]?\d.*|[-+]?\.(inf|nan)|~|null|true|false|yes|no|on|off", re.IGNORECASE)
_MAX_VALUE_CHARACTERS = 200
_MAX_VALUE_DEPTH = 8
_FIGURE_CHARACTERS = 120
_SI_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def printable(text: str) -> str:
    """Replaces the characters that standard output's encoding lacks: `✓` and some others by ASCII such as `OK`."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        for sign, plain in _PLAIN.items():
            text = text.replace(sign, plain)
        return text.encode(encoding, "replace").decode(encoding)
    return text


def format_value(value: Any) -> str:
    """A value on one line, as in YAML or on a command line: null, true, 5, name, 'two words', [1, 2].

    Text that would be read as another type is quoted. The middle of more than 200 characters is left out.
    """
    text = _value_text(value)
    if len(text) <= _MAX_VALUE_CHARACTERS:
        return text
    half = _MAX_VALUE_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]} ({len(text):,} characters)"


def _value_text(value: Any, depth: int = 0) -> str:
    if depth > _MAX_VALUE_DEPTH:
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
    """The number of columns of the terminal; 110 if standard output is not a terminal."""
    return shutil.get_terminal_size((_WIDTH, 0)).columns if sys.stdout.isatty() else _WIDTH


def paragraph(text: str) -> str:
    """The text in lines no wider than the output, broken only at spaces."""
    return textwrap.fill(printable(text), output_width(), break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> list[str]:
    """The lines of a table with aligned columns: the header, a rule, the rows.

    Columns are aligned to the right, except the first one and those with a title in `left`.
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
    """Two blocks of lines beside each other if the output is wide enough, else one below the other."""
    gap, width = "    ", max(map(len, one))
    if width + len(gap) + max(map(len, other)) > output_width():
        return [line.rstrip() for line in (*one, "", *other)]
    return [(left.ljust(width) + gap + right).rstrip() for left, right in zip_longest(one, other, fillvalue="")]


def humanize(name: str) -> str:
    """The name of a field in words: `grad_norm` becomes `grad norm`."""
    return name.replace("_", " ")


def truncate(text: str, characters: int) -> str:
    """The text, cut to at most this many characters; a text that is cut ends with an ellipsis."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def pluralize(number: int, noun: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_integer(number: int) -> str:
    """`1,234,567`."""
    return f"{number:,}"


def format_count(number: int) -> str:
    """A count in trillions, billions or millions with two decimals, such as `3.80B`; all digits below 10,000."""
    for size, unit in ((1e12, "T"), (1e9, "B")):
        if round(number / size, 2) >= 1:
            return f"{number / size:.2f}{unit}"
    return f"{number / 1e6:.2f}M" if number >= 10_000 else f"{number:,}"


def format_si(number: float, unit: str) -> str:
    """A number with an SI prefix and one decimal, such as `217.5 MB`, with a no-break space before the unit."""
    step = 0
    while round(abs(number), 1) >= 1000 and step < len(_SI_PREFIXES) - 1:
        number, step = number / 1000, step + 1
    digits = f"{number:.1f}" if step else f"{number:,.0f}"
    return f"{digits}\u00a0{_SI_PREFIXES[step]}{unit}".rstrip()


def format_percent(part: float, whole: float) -> str:
    """A part of a whole in percent, such as `12.3%`; `–` if the whole is 0.

    `0.0%` means exactly 0 and `100.0%` exactly the whole: a part that would round to them is `<0.1%` or `>99.9%`.
    """
    if whole <= 0:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.05:
        return "<0.1%"
    if 99.95 <= percent < 100:
        return ">99.9%"
    return f"{percent:,.1f}%"


def format_figure(value: Any) -> str:
    """A value as text: a float with four significant digits, a list with commas; text is cut to 120 characters.

    An integer has all its digits, and a float from 1,000 on has all digits before the point.
    """
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return format_integer(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return truncate(", ".join(map(format_figure, value)), _FIGURE_CHARACTERS)
    return truncate(str(value), _FIGURE_CHARACTERS)


def three_figures(number: float) -> str:
    """A number with three significant figures, or all digits before the point: `0.0123`, `4.57`, `12,345`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def dollars(amount: float) -> str:
    """An amount in dollars, with cents below $100."""
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:.2f}"


def gibibytes(num_bytes: float) -> str:
    """Bytes in GiB with one decimal, without the unit."""
    return f"{num_bytes / 2**30:,.1f}"


def format_distinct(one: float, other: float, shown: Callable[[Any], str]) -> tuple[str, str]:
    """Two different numbers as `shown` formats them, or with all their digits if `shown` makes them look equal."""
    short = (shown(one), shown(other))
    return short if short[0] != short[1] else (f"{one:,}", f"{other:,}")
